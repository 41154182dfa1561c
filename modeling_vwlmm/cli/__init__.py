"""The command line, a verb a file."""

from .main import main


__all__ = ["main"]
