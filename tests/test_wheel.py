"""The wheel holds the whole package: installed alone, it does what a checkout does."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from helpers import ROOT
from helpers.source import PACKAGE


NANO = ROOT / "hub_card" / "vwlmm-nano"
USE = """
import importlib, pkgutil, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import modeling_vwlmm
from modeling_vwlmm.hub.card import write_card
from modeling_vwlmm.processing import read_chat_template

site, nano, copy = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(nano)
assert type(model) is modeling_vwlmm.VWLmmForCausalLM
assert "ASSISTANT" in read_chat_template("vicuna_v1")
write_card(copy, "someone/nano")
assert "someone/nano" in Path(copy, "README.md").read_text()

for module in pkgutil.walk_packages(modeling_vwlmm.__path__, "modeling_vwlmm."):
    # lmms-eval, which is installed for few, imports the latter
    if not module.name.endswith(("__main__", "evaluation.lmms")):
        importlib.import_module(module.name)
elsewhere = {
    name: module.__file__
    for name, module in sys.modules.items()
    if name.partition(".")[0] == "modeling_vwlmm" and Path(site) not in Path(module.__file__).parents
}
assert not elsewhere, elsewhere
"""


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, as a build leaves folders beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("modeling_vwlmm", "hub_card"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("modeling_vwlmm/")}
    assert files - packed == set()
    card = {f"modeling_vwlmm/hub_card/{name}" for name in ("__init__.py", "modelcard_template.md")}
    assert packed - files == card  # and no weights of the model beside it


def test_lmms_eval_finds_the_model_by_its_entry_point(wheel):
    """Whose failure lmms-eval would only log."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    points = archive.read(name).decode()
    assert "[lmms_eval.models]\nvwlmm = modeling_vwlmm.evaluation.lmms:MANIFEST\n" in points
    assert "MANIFEST = ModelManifest(" in archive.read("modeling_vwlmm/evaluation/lmms.py").decode()


def test_installed_alone_it_loads_a_model_and_writes_a_card(wheel, tmp_path):
    site, copy = tmp_path / "site", tmp_path / "nano"
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel)
    shutil.copytree(NANO, copy)
    (copy / "README.md").unlink()
    done = subprocess.run(
        [sys.executable, "-c", USE, site, NANO, copy],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
