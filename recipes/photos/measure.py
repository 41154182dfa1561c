"""What a model has learnt of photos that it has not seen: its answers, and what its visual words name."""

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_vwlmm.data import load_conversations, open_images
from modeling_vwlmm.data.reading import words_of
from modeling_vwlmm.evaluation.evaluate import evaluate
from modeling_vwlmm.evaluation.intervals import interval
from modeling_vwlmm.evaluation.limits import name_matrix, naming, perplexity
from modeling_vwlmm.evaluation.questions import questions_of
from modeling_vwlmm.hub.card import LIMITS_TASK
from modeling_vwlmm.hub.card_facts import EVAL_RESULTS_NAME
from modeling_vwlmm.hub.card_pictures import EXAMPLES
from modeling_vwlmm.words import draw_words, readable


def mutual_information(words, kinds):
    """Of the words of patches and the kinds of their photos, in nats: I = sum p(w, k) log(p(w, k) / (p(w) p(k)))."""
    pairs, total = Counter(zip(words, kinds, strict=True)), len(words)
    of_word, of_kind = Counter(words), Counter(kinds)
    return sum(n / total * np.log(n * total / (of_word[word] * of_kind[kind])) for (word, kind), n in pairs.items())


def naming_of_photos(words, is_name):
    """Whether one of the words of each photo, (photos, k), names it, and the share of other photos that one names."""
    own, shuffled = naming(words[:, None], is_name)
    return own[:, 0], shuffled[:, 0]


def read_held_out(path, folder):
    """Of each photo: image, questions with answers, what counts as naming it, and its mask, None if there is none."""
    rows, records = load_conversations(path, folder), json.loads(Path(path).read_text(encoding="utf-8"))
    photos = []
    for i, record in enumerate(records):
        row, questions = rows[i], questions_of(rows.select([i]))
        mask = Path(folder).with_name("masks") / record["image"]
        photos.append(
            {
                "id": row["id"],
                "image": open_images(row)[0],
                "questions": questions,
                "kind": next((q.answers[0] for q in questions if q.text == "What kind of thing is it?"), ""),
                "names": set(record.get("names") or words_of(row["messages"])),
                "mask": np.asarray(Image.open(mask)) > 128 if mask.is_file() else None,
            }
        )
    return photos


@torch.no_grad()
def visual_words(model, processor, photos, batch_size=16):
    words = []
    for start in range(0, len(photos), batch_size):
        images = [photo["image"] for photo in photos[start : start + batch_size]]
        pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        words.append(model.visual_words(pixel_values.to(model.device)).cpu())
    return torch.cat(words)  # (photos, patches, V)


def on_object(mask, side):
    """Which patches the object covers by half, (side * side,); all of them where there is no mask."""
    if mask is None:
        return np.ones(side**2, dtype=bool)
    share = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    share = np.asarray(share).reshape(-1)
    return share >= min(128, share.max())


def measure_answers(model, processor, photos, batch_size=32):
    """`{question: (values, majority)}`: 1 for each photo that was answered right; the share of the usual answer.

    The answers themselves are kept in each photo's `answers`, in the order of its questions.
    """
    questions = [question for photo in photos for question in photo["questions"]]
    found = evaluate(model, processor, questions, ["exact_match"], batch_size=batch_size, max_new_tokens=12)
    right, answers = defaultdict(list), defaultdict(Counter)
    for question, score in zip(questions, found.scores["exact_match"], strict=True):
        right[question.text].append(score)
        answers[question.text][question.answers[0]] += 1
    said = iter(found.answers)
    for photo in photos:
        photo["answers"] = [next(said) for _ in photo["questions"]]
    return {
        question: (values, answers[question].most_common(1)[0][1] / len(values)) for question, values in right.items()
    }


def measure_words(model, processor, photos):
    """Figures of visual words by name: a list of values a photo each, or a number, or a dictionary of words."""
    words = visual_words(model, processor, photos)
    side = round(words.shape[1] ** 0.5)
    texts = [processor.tokenizer.decode([i]).strip().lower() for i in range(words.shape[-1])]
    is_word = torch.tensor([re.fullmatch(r"[a-z]{2,}", text) is not None for text in texts])
    average = words.mean((0, 1))
    is_name = name_matrix(texts, [photo["names"] for photo in photos])
    covered = [on_object(photo["mask"], side) for photo in photos]
    figures = {}
    for name, scores in (("", words), (", relative", words - average)):
        top = scores.topk(3, dim=-1).indices.numpy()
        own, shuffled = naming_of_photos(top.reshape(len(top), -1), is_name)
        figures[f"named by the top three of some patch{name}, own"] = own
        figures[f"named by the top three of some patch{name}, shuffled"] = shuffled
        figures[f"named by the top three of some patch{name}, own - shuffled"] = own - shuffled
        first = [[texts[i] for i in patches[where, 0]] for patches, where in zip(top, covered, strict=True)]
        usual = [[texts.index(Counter(patches).most_common(1)[0][0])] for patches in first]
        own, shuffled = naming_of_photos(np.array(usual), is_name)
        figures[f"named by the most frequent first word of the object{name}, own"] = own
        figures[f"named by the most frequent first word of the object{name}, own - shuffled"] = own - shuffled
        kinds = [photo["kind"] for photo in photos]
        for what, those in (("", kinds), (", kinds shuffled", np.random.default_rng(0).permutation(kinds))):
            of_patch = [kind for kind, patches in zip(those, first, strict=True) for _ in patches]
            figures[f"mutual information of first word and kind{name}{what}, nats"] = mutual_information(
                sum(first, []), of_patch
            )
    figures["probability of words (letters), patches of the object"] = [
        patches[where][:, is_word].sum(-1).mean().item() for patches, where in zip(words, covered, strict=True)
    ]
    figures["perplexity of a visual word"] = perplexity(words).mean(1).tolist()
    top = average.topk(8)
    figures["most probable on average"] = {
        texts[i]: round(p, 3) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    }
    return figures


def draw(model, processor, photos, path, relative=False, k=8):
    """A picture of photos with the first word of every patch, and what the model says of them."""
    words = visual_words(model, processor, photos)
    scores = words - words.mean((0, 1)) if relative else words
    chosen = range(0, len(photos), -(-len(photos) // k))
    tops = []
    for i in chosen:
        first = scores[i].argmax(-1)
        texts = [readable(processor.tokenizer, token) for token in first.tolist()]
        tops.append([[pair] for pair in zip(texts, words[i].gather(-1, first[:, None])[:, 0].tolist(), strict=True)])
    captions = [f"{photos[i]['questions'][0].text} {photos[i]['answers'][0]}" for i in chosen]
    draw_words(processor, [photos[i]["image"] for i in chosen], tops, captions, columns=2).savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="its folder")
    parser.add_argument("--held_out", default="runs/photos/data/held_out.json")
    parser.add_argument("--images", default="runs/photos/data/images")
    parser.add_argument("--save", action="store_true", help="write figures and pictures into the folder, for its card")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    photos = read_held_out(arguments.held_out, arguments.images)
    answers = measure_answers(model, processor, photos)
    lines, results = [], []
    for question, (values, majority) in answers.items():
        lines.append(("visual-question-answering", f"right answers: {question}", values, {"majority": majority}))
    for name, values in measure_words(model, processor, photos).items():
        lines.append((LIMITS_TASK, name, values, {}))
    for task, name, values, control in lines:
        if isinstance(values, dict):
            print(name, values)
            continue
        columns = {"held out": values}
        if np.ndim(values):
            columns = dict(zip(("held out", "95 % from", "to"), interval(values)[:3], strict=True))
        columns |= control
        shown = " ".join(f"{column} {value:.3f}" for column, value in columns.items())
        print(f"{name:75} {shown} ({np.size(values)})", flush=True)
        for column, value in columns.items():
            results.append(
                {
                    "task_type": task,
                    "dataset_type": "photos",
                    "dataset_name": "photos",
                    "dataset_split": column,
                    "metric_type": re.sub(r"\W+", "_", name).strip("_"),
                    "metric_name": name,
                    "metric_value": round(float(value), 4),
                }
            )
    if arguments.save:
        (Path(arguments.model) / EVAL_RESULTS_NAME).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        examples = Path(arguments.model) / EXAMPLES
        examples.mkdir(exist_ok=True)
        for i, photo in enumerate(photos[:: -(-len(photos) // 8)]):
            photo["image"].save(examples / f"{i}.png")
        for name, relative in (("visual_words", False), ("relative_words", True)):
            draw(model, processor, photos, Path(arguments.model) / f"{name}.png", relative)


if __name__ == "__main__":
    main()
