"""Fonts for whatever script."""

import shutil
from pathlib import Path

import matplotlib
import pytest

from helpers.pictures import pixels_of
from modeling_vwlmm.drawing import canvas, fonts_for


OWN = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def drawing_of(word):
    fonts = fonts_for([word])
    figure, axes = canvas(60, 30)
    fonts.write(axes, 2, 25, fonts.drawable(word), 20)
    return pixels_of(figure)


@pytest.mark.parametrize("pair", [("é", "è"), ("猫", "狗"), ("я", "ж"), ("⏎", "␣"), ("\ue000", "\ue001")])
def test_other_letters_look_different(pair):
    first, second = map(drawing_of, pair)
    assert first.min() < 255 and (first != second).any()


def test_a_character_that_no_font_has_is_its_code_point(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [])
    fonts = fonts_for(["Кот 猫"])
    assert fonts.families == ["DejaVu Sans"] and fonts.drawable("Кот 猫 $x_1$") == "Кот [732b] $x_1$"
    assert fonts.width("wide") == pytest.approx(fonts.width("wi") + fonts.width("de"), abs=0.1)


def test_a_font_of_the_system_draws_what_matplotlibs_own_lacks(monkeypatch, tmp_path, caplog):
    """A font of symbols stands for one of Chinese, which not every machine has."""
    symbols = tmp_path / "symbols.ttf"
    shutil.copy(OWN / "STIXNonUni.ttf", symbols)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    paths = [str(tmp_path / "broken.ttf"), str(OWN / "cmr10.ttf"), str(symbols)]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: paths)
    fonts = fonts_for(["a\ue000"])
    assert fonts.families == ["DejaVu Sans", "STIXNonUnicode"] and fonts.drawable("a\ue000") == "a\ue000"
    assert (drawing_of("\ue000") != drawing_of("[e000]")).any() and not caplog.messages
