"""How good is a model, and what do its visual words keep?"""
