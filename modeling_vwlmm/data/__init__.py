"""From a file to a batch: data sets of conversations about images."""

from .conversations import load_conversations
from .easy_vqa import easy_vqa
from .images import open_images
from .load import load_dataset


__all__ = ["easy_vqa", "load_conversations", "load_dataset", "open_images"]
