"""Chat templates that do not end, or fill the memory."""

import multiprocessing
import signal
import time

import pytest

from helpers.command_line import CPU, error_of, recipe_of
from helpers.conversations import tiny_processor
from helpers.tiny import tiny_config
from modeling_vwlmm import template_check
from modeling_vwlmm.cli import main
from modeling_vwlmm.template_check import check_template, rendering


DOUBLE = "{{% set n = namespace(x={}) %}}{{% for i in range(99) %}}{{% set n.x = n.x {} n.x %}}{{% endfor %}}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops in a loop": LOOPS,
    "a power": "{{ 9 ** 999999999 }}",
    "a text that doubles": DOUBLE.format("'x'", "+"),
    "a number that doubles": DOUBLE.format("3", "*"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(template_check, "SECONDS", 1)


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_does_not_end_is_ended(kind):
    started = time.monotonic()
    with pytest.raises(ValueError, match="^my/model: the chat template (does not end within 1|makes a text of more)"):
        check_template(tiny_processor(tiny_config(), ENDLESS[kind]), "my/model")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("template", ["{{ raise_exception('not so') }}", "{{ 1 / 0 }}", "{% broken", "fine"])
def test_what_ends_passes(template):
    check_template(tiny_processor(tiny_config(), template), "my/model")


def test_a_daemon_which_may_start_no_process_goes_on():
    """Such as a worker of `multiprocessing.Pool`."""
    processor = tiny_processor(tiny_config(), "fine")
    daemon = multiprocessing.get_context("fork").Process(target=check_template, args=[processor, "x"], daemon=True)
    daemon.start()
    daemon.join()
    assert daemon.exitcode == 0


def test_commands_name_the_model(tmp_path, capsys, model_folder, data):
    (model_folder / "chat_template.jinja").write_text(LOOPS)
    image = str(data.parent / "images" / "0.png")
    said = f"{model_folder}: the chat template does not end within 1 seconds"
    assert said in error_of(capsys, "generate", str(model_folder), image, "--prompt", "w20")
    assert said in error_of(capsys, "train", "--config", recipe_of(tmp_path, model_folder, data), *CPU)


def test_loops_over_what_few_conversations_hold_are_stopped_where_they_are_rendered():
    processor = tiny_processor(tiny_config(), "{% if messages|length > 7 %}" + LOOPS + "{% endif %}")
    check_template(processor, "my/model")
    with pytest.raises(ValueError, match="^the chat template does not end within 1 seconds"), rendering():
        processor.apply_chat_template([{"role": "user", "content": "w5"}] * 8)


def test_a_process_that_is_stopped_meanwhile_may_go_on():
    with rendering():
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 < signal.getitimer(signal.ITIMER_VIRTUAL)[0]
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_a_template_that_fails_is_one_line(tmp_path, capsys, model_folder, data):
    (model_folder / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    image = str(data.parent / "images" / "0.png")
    said = "the chat template fails with ZeroDivisionError: division by zero"
    assert said in error_of(capsys, "generate", str(model_folder), image, "--prompt", "w20")
    with pytest.raises(SystemExit):  # after the lines that say what trains
        main(["train", "--config", recipe_of(tmp_path, model_folder, data), *CPU])
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(f"): {said}")
