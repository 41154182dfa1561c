"""The command line, with a file for each verb."""

from .main import main


__all__ = ["main"]
