"""What it takes to read LLaVA's JSON, beside `json.load`: seconds and memory, at the first start and at the second.

python benchmarks/data.py                 stage 1's 558k pairs and stage 2's 665k conversations, drawn at random
python benchmarks/data.py --records 10000 as many of each

Each figure is of a process of its own. Files go to a temporary folder, which is removed in the end: 5 GB.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


PAIRS, CONVERSATIONS = 558_128, 665_298  # of LLaVA-1.5
IMAGES, A_FOLDER = 100_000, 1_000
WORDS = [first + last for first in "some any what there a of to in is".split() for last in "ed ing er s ly".split()]


def words(draw, count):
    return " ".join(draw.choices(WORDS, k=max(1, round(count))))


def pairs(count, draw):
    for i in range(count):
        question = draw.choice(["<image>\n{}", "{}\n<image>"]).format("Write a terse but informative summary of it.")
        caption = words(draw, draw.lognormvariate(2.7, 0.4))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        yield {"id": f"{i:09}", "image": name_of(draw.randrange(IMAGES)), "conversations": turns}


def conversations(count, draw):
    """2 to 18 turns, of 20 words in the median; one in seventeen without an image, as in LLaVA-1.5's mix."""
    for i in range(count):
        turns = []
        for turn in range(2 * draw.randint(1, 9)):
            text = words(draw, draw.lognormvariate(3, 1) if turn % 2 else 10)
            turns.append({"from": ["human", "gpt"][turn % 2], "value": text})
        record = {"id": f"{i:09}", "conversations": turns}
        if draw.randrange(17):
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = name_of(draw.randrange(IMAGES))
        yield record


def name_of(image):
    return f"{image // A_FOLDER:03}/{image:06}.jpg"


def write(path, records):
    with open(path, "w", encoding="utf-8") as file:
        for i, record in enumerate(records):
            file.write(("," if i else "[") + json.dumps(record))
        file.write("]")


def measured(what, path, images):
    """Seconds of CPU time, and the most memory, of one way to read the file."""
    if what == "json.load":
        memory, start = peak(), time.process_time()
        with open(path, encoding="utf-8") as file:
            rows = len(json.load(file))
    else:
        from modeling_vwlmm.data import load_conversations

        memory, start = peak(), time.process_time()
        rows = len(load_conversations(path, images))
    return {"seconds": time.process_time() - start, "MB": peak() - memory, "rows": rows}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, help="of each kind of data; as many as LLaVA-1.5 has if not given")
    parser.add_argument("--data", nargs="+", choices=["pairs", "conversations"], default=["pairs", "conversations"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(*arguments.measure)))
        return
    print("| data | reader | s | x json.load | MB |\n|---|---|---|---|---|")
    for kind in arguments.data:
        make, count = {"pairs": (pairs, PAIRS), "conversations": (conversations, CONVERSATIONS)}[kind]
        with tempfile.TemporaryDirectory() as folder:
            images, path = Path(folder, "images"), Path(folder, "data.json")
            for folder_of_images in {name_of(i).split("/")[0] for i in range(IMAGES)}:
                (images / folder_of_images).mkdir(parents=True)
            for i in range(IMAGES):
                (images / name_of(i)).touch()
            count = arguments.records or count
            write(path, make(count, random.Random(0)))
            environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(folder, "cache")), "HF_HUB_OFFLINE": "1"}
            data, yardstick = f"{count:,} {kind}, {path.stat().st_size / 1e6:,.0f} MB", None
            for reader in ("json.load", "first start", "second start"):
                command = [sys.executable, __file__, "--measure", reader, str(path), str(images)]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                assert found["rows"] == count
                yardstick = yardstick or found["seconds"]
                ratio = found["seconds"] / yardstick
                print(f"| {data} | {reader} | {found['seconds']:.1f} | {ratio:.1f} | {found['MB']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
