import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest


# What `datasets` keeps of data files, which no other run is to find
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vwlmm-datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
# Read by torch when it is imported. Tiny models are no faster with more threads, and much slower beside other work
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("helpers")
FOLDER = Path(__file__).parent

from helpers.conversations import picture, tiny_processor  # noqa: E402
from helpers.hub_server import local_hub  # noqa: E402
from helpers.tiny import tiny_model  # noqa: E402
from modeling_vwlmm.hub import push as hub_module  # noqa: E402


# Begun first, so that no worker is left with one of them at the end while the others have nothing to do
LONGEST = (
    *("trainer/test_devices.py", "trainer/test_checkpoints.py", "conversion/test_convert.py", "hub/test_push.py"),
    *("hub/test_push_errors.py", "hub/test_repository.py", "cli/test_export.py", "trainer/test_save_only_trained.py"),
    *("test_visual_word_loss_in_models.py", "trainer/test_integrity.py", "trainer/test_packing.py", "test_nano.py"),
    *("trainer/test_padding_free.py", "test_registration.py", "test_readme.py", "test_wheel.py"),
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(FOLDER).as_posix(), len(places)))


@pytest.fixture
def model_folder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for i in range(4):
        picture(i).save(tmp_path / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nw20 w21"}, {"from": "gpt", "value": f"w{30 + i}"}]
        records.append({"id": f"a{i}", "image": f"{i}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


@pytest.fixture
def hub(tmp_path):
    with local_hub(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def checked(monkeypatch):
    """The folders that would have been loaded, which is seen to elsewhere; retries do not wait."""
    names = []
    monkeypatch.setattr(hub_module, "check_loads", lambda staged, name, *arguments: names.append(name))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return names
