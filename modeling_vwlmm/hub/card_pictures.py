"""Draws the pictures of a model's card."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from transformers import AutoProcessor

from ..data.images import open_images
from ..files import read_json, read_json_object, replacing
from ..modeling_vwlmm import VWLmmForCausalLM
from ..words import draw_words, top_words
from .card_facts import listed


EXAMPLES, WORDS_PICTURE = "examples", "assets/visual_words.png"
EXAMPLE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
LOSSES, LOSSES_PICTURE = "assets/losses.json", "assets/losses.png"
LIMITS_PICTURE = "assets/limits.png"  # of `vwlmm evaluate --limits`
_LOSSES = ["loss", "lm_loss", "vw_loss"]


def draw_losses(folder: Path, stages: list[dict[str, Any]]) -> str | None:
    """Draw the losses of every stage into a folder, and write their numbers beside the picture.

    Returns:
        `str`, *optional*: the name of the picture; None if no losses are known.
    """
    losses = _losses(folder, stages)
    panels = [stage for stage in losses if "step" in stage]
    if not panels:
        return None
    from matplotlib.figure import Figure  # takes a second

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3 * columns + 0.5, 3 * rows), dpi=150, layout="constrained")
    for i, stage in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, i)
        # A stage without a visual-word loss, such as an LLM's own training, has one loss only
        for name in [name for name in _LOSSES[1:] if any(stage.get(name, []))] or _LOSSES[:1]:
            axes.plot(stage["step"], stage[name], label=name, linewidth=1)
        axes.set(title=stage["stage"] or "training", xlabel="step", ylabel="nats", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    with replacing(folder / LOSSES_PICTURE) as beside:
        figure.savefig(beside)
    lines = ",\n".join(json.dumps(stage) for stage in losses)
    with replacing(folder / LOSSES) as beside:
        beside.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return LOSSES_PICTURE


def _losses(folder: Path, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses of each stage: from the folder that it wrote, or from the last card if that folder is gone."""
    known = read_json(folder / LOSSES) if (folder / LOSSES).is_file() else []
    names = [stage.get("stage") for stage in stages] or [None]
    # A stage wrote the folder that the next one started from
    sources = [*((listed(stage.get("base_model")) or [None])[0] for stage in stages[1:]), folder]
    losses = []
    for i, (name, source) in enumerate(zip(names, sources, strict=True)):
        path = Path(source or "") / "trainer_state.json"
        if source and path.is_file():
            log = [entry for entry in read_json_object(path)["log_history"] if "loss" in entry]
            columns = {key: [entry[key] for entry in log if key in entry] for key in ("step", *_LOSSES)}
            losses.append({"stage": name, **{key: column for key, column in columns.items() if column}})
        else:
            losses.append(known[i] if i < len(known) else {"stage": name})
    return losses


def draw_visual_words(model: VWLmmForCausalLM, folder: Path) -> str | None:
    """Draw a model's visual words over the images in `examples`, or over coloured shapes if there are none.

    Returns:
        `str`, *optional*: the name of the picture; None if the patches are no grid.
    """
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    paths = sorted(path for suffix in EXAMPLE_SUFFIXES for path in (folder / EXAMPLES).glob(f"*{suffix}"))
    images = open_images({"images": [{"path": str(path), "bytes": None} for path in paths]}) or [_shapes()]
    training = model.training
    words = top_words(model.eval(), processor, images, k=1)
    model.train(training)
    try:
        picture = draw_words(processor, images, words)
    except ValueError:  # patches that are no grid
        return None
    with replacing(folder / WORDS_PICTURE) as beside:
        picture.savefig(beside)
    return WORDS_PICTURE


def _shapes() -> Image.Image:
    image = Image.new("RGB", (336, 336), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 150, 160), fill="red")
    draw.rectangle((190, 50, 310, 140), fill="green")
    draw.polygon([(168, 190), (90, 310), (246, 310)], fill="blue")
    return image
