"""What leaves the machine: the repository of a model, its card, and the way to the Hub."""
