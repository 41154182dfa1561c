"""The stamps of Tux Paint as training data: pictures on plain backgrounds, and conversations in LLaVA's JSON.

A stamp is a photo or a drawing of one object, cut out, with a caption in a text file beside it. What kind of thing it
is, and which sort of that, is in kinds.txt, where the longest path that fits counts. Training pictures are flipped,
moved, scaled, and laid on backgrounds of several colours, so that the background is no clue.
"""

import json
import random
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps


SIZE = 224
BACKGROUNDS = ["white", "white", "whitesmoke", "lightgray", "gray", "black", "lightblue", "palegreen", "khaki"]
# Drawings, besides those that are called cartoon
DRAWINGS = tuple(
    "clothes seasonal/e seasonal/ha seasonal/christmas/c symbols town/f town/m town/r people/toys food/pizza".split()
)
DESCRIBE = "What is this?"
QUESTIONS = {
    "name": "What is it called?",
    "kind": "What kind of thing is it?",
    "sort": "Which sort of that is it?",
}


def read_stamps(folder):
    """The stamps that show an object and have a caption: path, place, name, kind, sort, and whether it is a photo.

    The name is the caption without its article, and None where that is longer than three words.
    """
    lines = Path(__file__).with_name("kinds.txt").read_text(encoding="utf-8").splitlines()
    kinds = {path: (*words, None)[:2] for path, *words in map(str.split, lines)}
    stamps = []
    for path in sorted(Path(folder).rglob("*.png")):
        place, text = path.relative_to(folder).with_suffix("").as_posix(), path.with_suffix(".txt")
        starts = [start for start in kinds if place.startswith(start)]
        kind, sort = kinds[max(starts, key=len)] if starts else ("-", None)
        if kind == "-" or not text.is_file():
            continue
        caption = text.read_text(encoding="utf-8").split("\n")[0].replace("’", "'")
        caption = re.match(r"[^.!?]*", re.sub(r"[“”\"]|\s*\([^)]*\)?", "", caption).strip(" –"))[0]
        name = re.match(r"[^—]*", caption)[0].lower()
        name = re.sub(r"^a (pair|head|bunch|cluster) of |^(an?|the|some|two|our|eat your) ", "", name)
        stamps.append(
            {
                "path": path,
                "place": place,
                "name": name if len(name.split()) <= 3 else None,
                "kind": kind,
                "sort": sort,
                "is_photo": "cartoon" not in place and not place.startswith(DRAWINGS),
            }
        )
    return stamps


def split(stamps, share=0.25, seed=0):
    """Training stamps and held-out photos, by object: no object, by the last word of its name, is on both sides.

    Of each sort with four objects or more that share is held out, their drawings left out altogether.
    """
    common = {word for stamp in stamps for word in (stamp["kind"], stamp["sort"])}
    objects = defaultdict(lambda: defaultdict(list))
    for stamp in stamps:
        name = stamp["name"] or stamp["path"].stem.lower()
        last = re.sub(r"(?<=[^s])s$", "", name.split()[-1])
        # "hat" names many objects, "fedora" one
        objects[stamp["kind"], stamp["sort"]][name if last in common else last].append(stamp)
    chosen, order = set(), random.Random(seed)
    for of_sort in objects.values():
        photos = sorted(name for name, members in of_sort.items() if any(m["is_photo"] for m in members))
        if len(of_sort) >= 4:
            chosen.update(order.sample(photos, round(share * len(photos))))
    train, held_out = [], []
    for of_sort in objects.values():
        for name, members in of_sort.items():
            if name in chosen:
                held_out += [stamp for stamp in members if stamp["is_photo"]]
            else:
                train += members
    return train, held_out


def draw(stamp, size, background, order=None):
    """A stamp on a square of that background, and the mask of where it is; at random if `order` is given."""
    picture = Image.open(stamp["path"]).convert("RGBA")
    scale = 0.95 if order is None else order.uniform(0.6, 1.0)
    picture = ImageOps.contain(picture, (round(size * scale),) * 2, Image.Resampling.LANCZOS)
    left, top = (size - picture.width) // 2, (size - picture.height) // 2
    if order is not None:
        left, top = order.randint(0, 2 * left), order.randint(0, 2 * top)
        if order.random() < 0.5:
            picture = ImageOps.mirror(picture)
        alpha = picture.getchannel("A")
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast):
            picture = enhance(picture.convert("RGB")).enhance(order.uniform(0.8, 1.2))
        picture.putalpha(alpha)
    square, mask = Image.new("RGB", (size, size), background), Image.new("L", (size, size))
    square.paste(picture, (left, top), picture)
    mask.paste(picture.getchannel("A"), (left, top))
    return square, mask


def a(word):
    if word in ("clothing", "food") or word.endswith("s"):
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def caption(stamp):
    """What a stamp shows, from its name to its kind: "an owl, a bird, an animal"."""
    return ", ".join(a(word) for word in (stamp["name"], stamp["sort"], stamp["kind"]) if word)


def questions(stamp, words=None, order=None):
    """Questions about a stamp with their answers: all of them, or with `order` some at random.

    Those of yes or no ask for an animal, and for one of `words`, all kinds and sorts, which half of the time it is.
    """
    asked = [(QUESTIONS[field], stamp[field]) for field in QUESTIONS if stamp[field]]
    true = [word for word in (stamp["kind"], stamp["sort"]) if word]
    if order is None:
        about = ["animal"]
    else:
        wrong = order.choice(sorted(set(words) - set(true)))
        about = [order.choice(true) if order.random() < 0.5 else wrong, "animal"]
    asked += [(f"Is it {a(word)}?", "yes" if word in true else "no") for word in dict.fromkeys(about)]
    return asked if order is None else order.sample(asked, min(3, len(asked)))


def record(name, picture, pairs):
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": name, "image": picture, "conversations": turns}


def make(stamps_folder, folder, copies=8, seed=0):
    """Write captions.json, conversations.json, both as reading.json, and held_out.json, with images/ for them.

    masks/ says where the held-out objects are.
    """
    folder, order = Path(folder), random.Random(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    train, held_out = split(read_stamps(stamps_folder))
    words = sorted({word for stamp in train for word in (stamp["kind"], stamp["sort"]) if word})
    files = {"captions": [], "conversations": [], "held_out": []}
    for stamp in held_out:
        name = stamp["place"].replace("/", "_") + ".png"
        for kind, picture in zip(("images", "masks"), draw(stamp, SIZE, "white"), strict=True):
            picture.save(folder / kind / name)
        # What counts as naming it: of "red kangaroo" the last word
        names = [word.split()[-1] for word in (stamp["name"], stamp["sort"], stamp["kind"]) if word]
        asked = record(stamp["place"], name, [(DESCRIBE, caption(stamp)), *questions(stamp)])
        files["held_out"].append({**asked, "names": names})
    for i in range(copies):
        for stamp in train:
            name = f"{stamp['place'].replace('/', '_')}-{i}.jpg"
            draw(stamp, SIZE, order.choice(BACKGROUNDS), order)[0].save(folder / "images" / name, quality=90)
            files["captions"].append(record(f"{stamp['place']}-{i}", name, [(DESCRIBE, caption(stamp))]))
            asked = questions(stamp, words, order)
            files["conversations"].append(record(f"{stamp['place']}-{i}", name, asked))
    files["reading"] = files["captions"] + files["conversations"]
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return len(train), len(held_out)
