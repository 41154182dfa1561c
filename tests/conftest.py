import atexit
import json
import os
import shutil
import tempfile

import pytest


# What `datasets` keeps of data files, which no other run is to find
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vwlmm-datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
# Read by torch when it is imported. Tiny models are no faster with more threads, and much slower beside other work
os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("helpers")

from helpers.conversations import picture, tiny_processor  # noqa: E402
from helpers.hub_server import local_hub  # noqa: E402
from helpers.tiny import tiny_model  # noqa: E402
from modeling_vwlmm.hub import push as hub_module  # noqa: E402


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
