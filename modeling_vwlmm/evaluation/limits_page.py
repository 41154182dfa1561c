"""The limits report as a page: Markdown, a picture, and results for the card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing, write_json
from ..hub.card import LIMITS_TASK
from ..hub.card_facts import INTERVAL
from ..hub.card_pictures import LIMITS_PICTURE
from .intervals import Interval
from .limits_report import Row, Value


QUESTIONS = {
    "information loss": "How much of an image survives in its visual words? f are the features of a patch, f' is what "
    "its visual word makes of them, sum w[v] E[v].",
    "semantic gap": "Do the most probable words name what the image shows? Names are words of the image's answers, or "
    "its column `names`. A word that is everywhere names other images as often.",
    "bias": "Which words carry the probability?",
    "expressiveness": "How many words does a visual word spread over?",
    "alignment control": "What is right without the right image? The same accuracy says that the image is not used.",
    "left out": "What could not be asked?",
}


def results_of_limits(rows: Sequence[Row], dataset: str) -> list[dict[str, Any]]:
    """The report in the form of `eval_results.json`: the fields of [`~huggingface_hub.EvalResult`]."""
    return [
        {
            "task_type": LIMITS_TASK,
            "dataset_type": dataset,
            "dataset_name": dataset,
            "dataset_split": split,
            "metric_type": re.sub(r"\W+", "_", row.name).strip("_"),
            "metric_name": f"{row.topic}: {row.name}",
            "metric_value": round(value.mean if isinstance(value, Interval) else value, 4),
            **({"metric_args": {INTERVAL: _ends(value)}} if isinstance(value, Interval) else {}),
        }
        for split in _splits(rows)  # one after another: the card's metadata group them by split
        for row in rows
        if (value := row.values.get(split)) is not None and not isinstance(value, list)
    ]


def write_page(rows: Sequence[Row], folder: Path, title: str) -> Path:
    """Write `limits.md`, `limits.json` and the picture into a folder; returns the path of the page."""
    (folder / LIMITS_PICTURE).parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder / LIMITS_PICTURE) as beside:
        draw_limits(rows).savefig(beside)
    values = {
        f"{row.topic}: {row.name}": {
            split: dict(zip(Interval.__annotations__, value, strict=True)) if isinstance(value, Interval) else value
            for split, value in row.values.items()
        }
        for row in rows
    }
    write_json(folder / "limits.json", values)
    page = folder / "limits.md"
    with replacing(page) as beside:
        beside.write_text(markdown(rows, title), encoding="utf-8")
    return page


def markdown(rows: Sequence[Row], title: str) -> str:
    splits = _splits(rows)
    lines = [f"# Limits of {title}", "", f"![The figures below as bars]({LIMITS_PICTURE})", ""]
    lines += ["Means with 95 % intervals over images drawn anew.", ""]
    for topic, question in QUESTIONS.items():
        own = [row for row in rows if row.topic == topic]
        if own:
            lines += [f"## {topic.capitalize()}", "", question, "", f"| | {' | '.join(splits)} |"]
            lines += ["|---" * (len(splits) + 1) + "|"]
            for row in own:
                shown = [_shown(row.values[split]) if split in row.values else "" for split in splits]
                lines.append(f"| {row.name} | {' | '.join(shown)} |")
            lines.append("")
    if len(splits) > 1:
        lines += ["## Overfitting", "", "It is what differs between the columns above.", ""]
    return "\n".join(lines)


def draw_limits(rows: Sequence[Row]) -> Any:
    """The figures as bars, a panel a topic: a `matplotlib.figure.Figure`.

    Figures beyond 1 have their number alone, and words stand on the page.
    """
    from matplotlib.figure import Figure  # takes a second

    splits = _splits(rows)
    figures = [row for row in rows if not any(isinstance(value, list) for value in row.values.values())]
    panels = {topic: [row for row in figures if row.topic == topic] for topic in QUESTIONS}
    panels = {topic: own for topic, own in panels.items() if own}
    heights = [len(own) + 1.2 for own in panels.values()]
    figure = Figure(figsize=(9, 0.36 * sum(heights) + 0.6), dpi=120, layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    thickness = 0.8 / len(splits)
    for place, (topic, own) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[place])
        for i, split in enumerate(splits):
            for y, row in enumerate(own):
                value = row.values.get(split)
                if value is None or isinstance(value, list):
                    continue
                mean = value.mean if isinstance(value, Interval) else value
                at, color = y + (i - (len(splits) - 1) / 2) * thickness, f"C{i}"
                if mean <= 1:
                    axes.barh(at, mean, thickness, color=color)
                    if isinstance(value, Interval):
                        axes.plot([value.low, value.high], [at, at], color="black", linewidth=1)
                end = max(value.high, mean) if isinstance(value, Interval) else mean
                axes.text((end if mean <= 1 else 0) + 0.01, at, f"{mean:.3g}", va="center", fontsize=7, color="0.2")
        axes.set(xlim=(min(0, axes.get_xlim()[0]), 1.08), ylim=(len(own) - 0.4, -0.6))
        axes.set_yticks(range(len(own)), [row.name for row in own], fontsize=8)
        axes.set_title(topic, fontsize=9, loc="left", fontweight="bold")
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 0 and len(splits) > 1:
            from matplotlib.patches import Patch

            handles = [Patch(color=f"C{i}", label=split) for i, split in enumerate(splits)]
            axes.legend(handles=handles, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(splits))
    return figure


def _splits(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(split for row in rows for split in row.values))


def _ends(value: Interval) -> list[float]:
    return [round(value.low, 4), round(value.high, 4)]


def _shown(value: Value) -> str:
    if isinstance(value, list):
        return ", ".join(f"{_literally(word)} {mass:.3f}" for word, mass in value)
    if isinstance(value, Interval):
        return f"{value.mean:.4g} [{value.low:.4g}, {value.high:.4g}]"
    return f"{value:.4g}"


def _literally(word: str) -> str:
    """A word in a cell of a table, whatever it would mean in Markdown."""
    fence = "``" if "`" in word else "`"
    blank = " " if "`" in word else ""
    return f"{fence}{blank}{word}{blank}{fence}".replace("|", "\\|")
