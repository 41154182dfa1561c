"""What easy_vqa.yaml asks, and how its answers are compared."""

from modeling_vwlmm.data.images import open_images
from modeling_vwlmm.evaluation.metrics import exact_match


def doc_to_visual(doc):
    return open_images({"images": doc["images"], "id": doc["id"]})


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["messages"][0]["content"][-1]["text"]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    images = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": doc_to_text(doc)}]}]


def process_results(doc, results):
    return {"right_answers": exact_match(results[0], [doc["answer"]])}
