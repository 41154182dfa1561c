"""What several tests share. A script beside this folder, and pytest, find it as `helpers`."""

from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
