"""One folder of a model made of another."""
