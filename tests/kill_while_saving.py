"""Kill `vwlmm train` while it saves. The same command, run again, must end with the same weights.

python tests/kill_while_saving.py FOLDER --times 20 [--lora]
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from helpers.command_line import CPU, recipe_of
from helpers.conversations import picture, tiny_processor
from helpers.tiny import tiny_model
from modeling_vwlmm.cli import main as vwlmm


def prepare(folder, lora):
    """A tiny model whose training draws random numbers, six samples, and a recipe that saves every second step."""
    model = tiny_model()
    model.config.text_config.attention_dropout = 0.2
    model.save_pretrained(folder / "model")
    tiny_processor(model.config).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    records = []
    for i in range(6):
        picture(i).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nw20 w21"}, {"from": "gpt", "value": f"w{30 + i}"}]
        records.append({"image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    fields = {"max_steps": 10, "per_device_train_batch_size": 1, "save_steps": 2, "save_total_limit": 1}
    fields |= {"use_peft": True, "lora_r": 2, "lora_dropout": 0.3} if lora else {}
    recipe_of(folder, folder / "model", folder / "data.json", learning_rate=0.01, **fields)


def train(folder, output_dir, kill_at=None, delay=0.0):
    """Runs the recipe, and is killed `delay` seconds after it has touched a file of `output_dir` `kill_at` times."""
    touched = 0

    def count(event, arguments):
        nonlocal touched
        if any(str(output_dir) in str(argument) for argument in arguments if isinstance(argument, (str, os.PathLike))):
            touched += 1
            if touched == kill_at:
                if not delay:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL))).start()

    sys.addaudithook(count)
    saves = ["--output_dir", str(output_dir), "--save_strategy", "steps"]
    vwlmm(["train", "--config", str(folder / "recipe.yaml"), *CPU, "--disable_tqdm", "true", *saves])
    (folder / "touched").write_text(str(touched))


def in_child(function, *arguments):
    """Exit status of a process that does this: one that nothing has been computed in can be forked."""
    child = os.fork()
    if child == 0:
        output = os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, 1)
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    folder, name = arguments.folder, "adapter_model.safetensors" if arguments.lora else "model.safetensors"
    folder.mkdir(parents=True)
    assert in_child(prepare, folder, arguments.lora) == 0
    assert in_child(train, folder, folder / "whole") == 0
    expected = (folder / "whole" / name).read_bytes()
    touched = int((folder / "touched").read_text())
    chosen = random.Random(0)
    resumed = 0
    for i in range(arguments.times):
        output_dir = folder / f"killed-{i:03}"
        kill_at, delay = 1 + int((i + chosen.random()) * touched / arguments.times), chosen.choice([0, 0.001, 0.005])
        assert in_child(train, folder, output_dir, kill_at, delay) == -signal.SIGKILL
        left = sorted(path.name for path in output_dir.iterdir()) if output_dir.exists() else []
        resumed += any(name.startswith("checkpoint-") for name in left)
        assert in_child(train, folder, output_dir) == 0
        assert (output_dir / name).read_bytes() == expected, output_dir
        print(f"killed at {kill_at} of {touched} plus {1000 * delay:.0f} ms, leaving {left}: same weights", flush=True)
    print(f"{arguments.times} times killed while saving, {resumed} times with a checkpoint: all with the same weights")


if __name__ == "__main__":
    main()
