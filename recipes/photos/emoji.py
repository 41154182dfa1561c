"""Emoji as training data: the same 849 things in four styles, of which one is held out, so that their names are known.

    python recipes/photos/emoji.py runs/emoji
    make photos DATA=runs/emoji/train.json HELD_OUT=runs/emoji/held_out.json IMAGES=runs/emoji/images

Needs npm, which fetches the drawings (Noto: Apache-2.0; Twemoji: CC-BY 4.0; OpenMoji: CC-BY-SA 4.0; Fluent: MIT), and
resvg-py, which draws SVG.
"""

import argparse
import io
import json
import random
import re
import subprocess
import tarfile
from pathlib import Path

from stamps import BACKGROUNDS, DESCRIBE, QUESTIONS, SIZE, a, draw, record


PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "openmoji": "openmoji@17.0.0",
    "fluent": "fluentui-emoji@1.3.0",
}
HELD_OUT = "twemoji"
GROUPS = ("animals-nature", "food-drink", "travel-places", "objects", "activities")


def fetch(folder):
    """The four packages, unpacked: a folder of each."""
    folders = {}
    for style, package in PACKAGES.items():
        folders[style] = folder / style / "package"
        if not folders[style].is_dir():
            (folder / style).mkdir(parents=True, exist_ok=True)
            name = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
            ).stdout.split()[-1]
            with tarfile.open(folder / name) as archive:
                archive.extractall(folder / style, filter="data")
    return folders


def things(folders):
    """What all styles have: its name, its kind, and the file of each style."""
    found = []
    for emoji in json.loads((folders["openmoji"] / "data/openmoji.json").read_text(encoding="utf-8")):
        name, code = emoji["annotation"].lower().replace("’", ""), emoji["hexcode"].lower()
        files = {"openmoji": folders["openmoji"] / f"color/svg/{emoji['hexcode']}.svg"}
        files["fluent"] = folders["fluent"] / f"icons/modern/{re.sub('[^a-z0-9]+', '-', name).strip('-')}.svg"
        for style, vendor in (("noto", "google"), ("twemoji", "twitter")):
            places = [folders[style] / f"img/{vendor}/64/{code}{variant}.png" for variant in ("", "-fe0f")]
            files[style] = next((place for place in places if place.is_file()), places[0])
        if emoji["group"] in GROUPS and not emoji["skintone"] and all(map(Path.is_file, files.values())):
            found.append({"name": name, "kind": emoji["subgroups"].split("-")[0], "files": files})
    return found


def opened(path):
    """A drawing as a file that Pillow reads."""
    if path.suffix != ".svg":
        return path
    import resvg_py

    return io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), width=SIZE))


def make(packages, folder, copies=3, seed=0):
    """Write train.json, held_out.json and their images/."""
    folder, order = Path(folder), random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    train, held_out = [], []
    for thing in things(fetch(packages)):
        pairs = [
            (DESCRIBE, ", ".join(a(thing[field]) for field in ("name", "kind"))),
            (QUESTIONS["name"], thing["name"]),
            (QUESTIONS["kind"], thing["kind"]),
        ]
        for style, path in thing["files"].items():
            for i in range(1 if style == HELD_OUT else copies):
                name = f"{style}-{thing['name'].replace(' ', '_').replace('/', '_')}-{i}.jpg"
                augmented = (order.choice(BACKGROUNDS), order) if style != HELD_OUT else ("white",)
                draw({"path": opened(path)}, SIZE, *augmented)[0].save(folder / "images" / name, quality=90)
                if style == HELD_OUT:
                    names = [*thing["name"].split()[-1:], thing["kind"]]
                    held_out.append({**record(name, name, pairs), "names": names})
                else:
                    train.append(record(name, name, order.sample(pairs, len(pairs))))
    for name, records in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return len(train), len(held_out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print("{} pictures to train on, {} held out".format(*make(folder / "packages", folder)))
