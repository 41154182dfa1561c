"""Images in a folder, data files beside it."""

import json

import pytest
from PIL import Image as PILImage

from modeling_vwlmm.data import load_conversations


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        PILImage.new("RGB", (4 + i, 3), (10 * i, 20, 30)).save(folder / name)
    return folder


@pytest.fixture
def load(tmp_path, images):
    """Writes records as a data file and loads it."""

    def load(records, name="data.json"):
        content = records
        if not isinstance(records, str):
            content = "\n".join(map(json.dumps, records)) if name.endswith(".jsonl") else json.dumps(records)
        (tmp_path / name).write_text(content, encoding="utf-8")
        return load_conversations(tmp_path / name, images)

    return load
