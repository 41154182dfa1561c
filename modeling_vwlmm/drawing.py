"""What pictures are drawn with: a canvas in pixels, and fonts for whatever script."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 100


def canvas(width: int, height: int) -> "tuple[Figure, Axes]":
    """An empty figure whose only axes are measured in its pixels, from the top left corner."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def paste(axes: "Axes", image: Any, left: float, top: float, width: float, height: float) -> None:
    """Draw a PIL image or an array, its pixels sharp, into a rectangle of a [`canvas`]."""
    axes.imshow(
        image,
        extent=(left, left + width, top + height, top),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=255,
    )
    axes.set(xlim=(0, axes.figure.bbox.width), ylim=(axes.figure.bbox.height, 0))  # which imshow moves


class Fonts(NamedTuple):
    """Fonts that follow one another: a character is drawn by the first one that has it.

    families: their names. paths: their files. characters: the code points that one of them has.
    """

    families: list[str]
    paths: list[str]
    characters: frozenset[int]

    def drawable(self, text: str) -> str:
        """The text with the code point of every character that all fonts lack, which would all be the same box."""
        return "".join(c if ord(c) in self.characters else f"[{ord(c):x}]" for c in text)

    def width(self, text: str) -> float:
        """How wide a drawable text is, in units of its size."""
        return _width(tuple(self.paths), text)

    def write(self, axes: "Axes", x: float, y: float, text: str, size: float, **look: Any) -> None:
        """Write a drawable text of a size in pixels onto a [`canvas`]; `look` is of matplotlib's `Text`."""
        axes.text(x, y, text, fontsize=size * 72 / DPI, family=self.families, parse_math=False, **look)


def fonts_for(texts: Iterable[str]) -> Fonts:
    """matplotlib's own font, which has Latin, Greek, Cyrillic and more, and the system's for what it lacks.

    Of the system's fonts, that which has most of the characters still missing comes first.
    """
    from matplotlib import font_manager, get_data_path

    own = str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    families, paths, characters = ["DejaVu Sans"], [own], _characters(own)[0]
    missing = {ord(c) for text in texts for c in text} - characters
    while missing:
        found = {path: _characters(path) for path in sorted(font_manager.findSystemFonts())}
        best = max(found, key=lambda path: (len(found[path][0] & missing), found[path][2]), default=None)
        if best is None or not found[best][0] & missing:
            break
        has, family, _ = found[best]
        if family not in font_manager.get_font_names():  # installed after matplotlib listed them
            font_manager.fontManager.addfont(best)
        families, paths, characters = [*families, family], [*paths, best], characters | has
        missing -= has
    return Fonts(families, paths, characters)


@functools.lru_cache(maxsize=10_000)
def _width(paths: tuple[str, ...], text: str) -> float:
    from matplotlib.font_manager import get_font

    font = get_font(paths)
    font.set_size(100, 72)  # hinting hardly counts at this size
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 100


@functools.cache
def _characters(path: str) -> tuple[frozenset[int], str, bool]:
    """The code points of a font, its family, and whether it is a regular one; no code points if it cannot be drawn."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        # Such as emoji in colours, which are bitmaps
        points = frozenset(font.get_charmap()) if font.scalable else frozenset()
        return points, font.family_name, not font.style_flags
    except Exception:  # a damaged file of the system's is no reason to draw nothing
        return frozenset(), "", False
