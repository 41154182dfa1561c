"""Conversion of one model folder into another."""
