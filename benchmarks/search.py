"""How well visual words find images, on easy-VQA's test images, and how fast.

python benchmarks/search.py MODEL        needs scipy, bm25s and easy-vqa
"""

import argparse
import time

import bm25s
import numpy as np
from scipy import sparse
from transformers import AutoProcessor

from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.data import easy_vqa
from modeling_vwlmm.data.easy_vqa import COLORS, SHAPES
from modeling_vwlmm.evaluation.generation import generate_answers
from modeling_vwlmm.evaluation.questions import Question
from modeling_vwlmm.looking.search import Index, make_index, search


# The quickstart's models answer questions, so their caption of an image is what they answer to both
QUESTIONS = ("what color is the shape?", "what shape does the image contain?")


def captions_of(model, processor, paths):
    questions = [
        Question(
            path,
            [{"path": path, "bytes": None}],
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"\n{text}"}]}],
            [],
        )
        for path in paths
        for text in QUESTIONS
    ]
    answers = dict(generate_answers(model, processor, questions, 256, max_new_tokens=3))
    return [
        " ".join(answers[len(QUESTIONS) * i + k].strip() for k in range(len(QUESTIONS))) for i in range(len(paths))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder")
    arguments = parser.parse_args()
    model = VWLmmForCausalLM.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    rows = easy_vqa("test", "caption").to_list()
    paths = [row["images"][0]["path"] for row in rows]
    shown = [row["messages"][-1]["content"][0]["text"].removeprefix("a ") for row in rows]
    queries = [f"{color} {shape}" for color in sorted(COLORS) for shape in sorted(SHAPES)]
    of = {path: text for path, text in zip(paths, shown, strict=True)}

    print(f"{len(queries)} queries, {len(paths)} images; precision at 10, %")
    print(f"{'chance':35}{100 * np.mean([shown.count(query) / len(shown) for query in queries]):8.1f}")
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(captions_of(model, processor, paths), show_progress=False), show_progress=False)
    hits = []
    for query in queries:
        found, _ = retriever.retrieve(bm25s.tokenize(query, show_progress=False), k=10, show_progress=False)
        hits.append(np.mean([shown[i] == query for i in found[0]]))
    print(f"{'BM25 over the answers of the model':35}{100 * np.mean(hits):8.1f}")
    for pooling in ("max", "sum"):
        started = time.perf_counter()
        index, _ = make_index(model, processor, paths, pooling, batch_size=64)
        seconds = time.perf_counter() - started
        hits = [np.mean([of[path] == query for path, _ in search(index, query, 10)]) for query in queries]
        print(
            f"{'visual words, ' + pooling:35}{100 * np.mean(hits):8.1f}   {len(paths) / seconds:6.0f} images indexed/s"
        )
    times = -(-10_000 // len(paths))
    large = Index(
        sparse.csr_array(sparse.vstack([index.vectors] * times)[:10_000]), (paths * times)[:10_000], index.texts
    )
    started = time.perf_counter()
    for query in queries:
        search(large, query, 10)
    print(f"10,000 images: {len(queries) / (time.perf_counter() - started):.0f} queries a second")


if __name__ == "__main__":
    main()
