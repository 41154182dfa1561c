"""Feeds damaged and hostile files to the command line: `make attack`, or `python tests/attack.py --trials 100`.

Each trial changes one file of a tiny model, its data, an image or a recipe, as the seed says, and runs a verb on it in
a process of its own. It has to end with exit status 0, or with 2 and one line; not with a traceback, not after a
minute, not with more than 4 GB of memory, and not with code of the files run. What did is printed with its number,
which `--only` repeats.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path


os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1", HF_DATASETS_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent))

import yaml  # noqa: E402

import modeling_vwlmm.trainer.sft_trainer  # noqa: E402, F401  # before the fork: it takes seconds
from helpers.command_line import CPU, recipe_of  # noqa: E402
from helpers.conversations import picture, tiny_processor  # noqa: E402
from helpers.tiny import tiny_model  # noqa: E402
from modeling_vwlmm.cli import main as vwlmm  # noqa: E402


SECONDS, MEMORY = 60, 4 * 2**30
VALUES = [None, True, -1, 0, 1, 7, 10**6, 10**12, 1e39, float("nan"), "", "x", "[1]", [], [1], {}, {"a": 1}, "../../x"]
TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**11 }}",
    "{{ 'a'.center(10**11) }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% for",
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ raise_exception('no') }}",
]
MODEL_FILES = [
    *("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"),
    *("tokenizer.json", "model.safetensors", "chat_template.jinja"),
]


def prepare(folder):
    """A model, images, data and a recipe, and code that no trial may run."""
    model = tiny_model()
    model.save_pretrained(folder / "model")
    tiny_processor(model.config).save_pretrained(folder / "model")
    (folder / "model" / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (folder / "images").mkdir()
    records = []
    for i in range(4):
        picture(i).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nw20 w21"}, {"from": "gpt", "value": f"w{30 + i}"}]
        records.append({"id": f"a{i}", "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    recipe_of(folder, folder / "model", folder / "data.json")


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate_value(value, chosen):
    """A JSON value with another value, no value or code at one place."""
    found = list(places(value))
    if not found:
        return chosen.choice(VALUES)
    *path, last = chosen.choice(found[:500])
    if last == "max_steps":  # as many as one asks for are no hang
        return value
    at = value
    for key in path:
        at = at[key]
    kind = chosen.random()
    if kind < 0.15:
        del at[last]
    elif kind < 0.25 and isinstance(at, dict):
        at["auto_map"] = {"AutoProcessor": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    else:
        at[last] = chosen.choice(VALUES)
    return value


def mutate_bytes(content, chosen):
    kind, content = chosen.random(), bytearray(content)
    if kind < 0.3:
        return bytes(content[: chosen.randrange(len(content))])
    if kind < 0.4:
        return chosen.choice([b"", b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\n", b"[]", os.urandom(64)])
    for _ in range(chosen.choice([1, 8, 64])):
        content[chosen.randrange(min(len(content), 4096))] = chosen.randrange(256)
    return bytes(content)


def mutate(path, chosen):
    if path.suffix == ".jinja" and chosen.random() < 0.8:
        path.write_text(chosen.choice(TEMPLATES))
    elif path.suffix in (".json", ".yaml") and chosen.random() < 0.85:
        content = mutate_value(yaml.safe_load(path.read_text()), chosen)
        path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), chosen))


def command_of(folder, number, seed):
    """Changes a file as trial `number` does, and returns what is changed and the command that reads it."""
    chosen = random.Random(f"{seed} {number}")
    kind = chosen.choice(["model"] * 5 + ["image"] * 2 + ["recipe"] * 2 + ["data"])
    image, model, out = str(folder / "images" / "0.png"), str(folder / "model"), str(folder / "out")
    if kind == "model":
        path = folder / "model" / chosen.choice(MODEL_FILES)
        commands = [
            ["generate", model, image, "--prompt", "w5", "--max-new-tokens", "2"],
            ["words", model, image, "--json"],
            ["train", "--config", str(folder / "recipe.yaml"), *CPU],
            ["export", model, out, "--to", "llava"],
        ]
        command = chosen.choice(commands)
    elif kind == "image":
        path, command = Path(image), ["words", model, image, "--json"]
    else:
        path = folder / ("recipe.yaml" if kind == "recipe" else "data.json")
        command = ["train", "--config", str(folder / "recipe.yaml"), *CPU]
    if path.exists():
        mutate(path, chosen)
    return path.name, command


def trial(folder, number, seed):
    """What became of a trial, `"0"`, `"2"`, or what is wrong, what it said, and the bytes of memory that it took."""
    shutil.rmtree(folder / "trial", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "trial")
    recipe = folder / "trial" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(folder / "whole"), str(folder / "trial")))
    name, command = command_of(folder / "trial", number, seed)
    child = os.fork()
    if child == 0:
        os.chdir(folder / "trial")
        for number_of, path in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number_of)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 3 * MEMORY,) * 2)  # which spares the machine
        status = 1
        try:
            vwlmm(command)
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    deadline, ended = time.monotonic() + SECONDS, 0
    while ended == 0 and time.monotonic() < deadline:
        ended, code, used = os.wait4(child, os.WNOHANG)
        time.sleep(0.005)
    said = f"{name}: {' '.join(command[:1])}"
    if ended == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hang", said, 0
    memory = used.ru_maxrss * 1024
    lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    last = lines[-1][:300] if lines else ""
    if (folder / "whole" / "ran").exists() or (folder / "trial" / "ran").exists():
        return "code run", said, memory
    status = os.waitstatus_to_exitcode(code)
    if memory > MEMORY:
        return "memory", f"{said}: {memory / 2**30:.1f} GB", memory
    if status == 2 and last.startswith("vwlmm "):
        return "2", last, memory
    return ("0" if status == 0 else "traceback" if status == 1 else f"status {status}"), f"{said}: {last}", memory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one trial, whose command prints what it prints")
    arguments = parser.parse_args()
    counts, most, started = collections.Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vwlmm-attack-") as scratch:
        folder = Path(scratch)
        (folder / "whole").mkdir()
        child = os.fork()  # a process that has computed something cannot be forked
        if child == 0:
            prepare(folder / "whole")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        for number in range(arguments.trials) if arguments.only is None else [arguments.only]:
            result, said, memory = trial(folder, number, arguments.seed)
            counts[result] += 1
            most = max(most, memory)
            if result not in ("0", "2") or arguments.only is not None:
                print(f"trial {number}: {result}: {said}", flush=True)
        if arguments.only is not None:
            print((folder / "stderr").read_text(errors="replace"))
    minutes = (time.monotonic() - started) / 60
    print(f"{sum(counts.values())} trials in {minutes:.1f} minutes, {most / 2**30:.1f} GB at most: {dict(counts)}")
    sys.exit(0 if set(counts) <= {"0", "2"} else 1)


if __name__ == "__main__":
    main()
