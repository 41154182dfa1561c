"""The model card."""

import os
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


def write_card(folder: str | os.PathLike, repo_id: str | None = None, card_text: str | None = None) -> ModelCard:
    """Write README.md into a model folder, and return it as a card; `card_text` is what it said before."""
    data = ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag="image-text-to-text", tags=["vwlmm"]
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id or Path(folder).name}\n")
    if card_text is not None:
        card.text = ModelCard(card_text, ignore_metadata_errors=True).text
    card.save(Path(folder) / "README.md")
    return card
