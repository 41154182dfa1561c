"""Tiny conversations with pictures, a processor for them."""

import datasets
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_vwlmm.processing import make_processor


ANSWERS = ["w5 w6", "w7", "w8 w9 w10 w11 w12", "w13 w14 w15"]
# Says who speaks, and marks nothing
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}{% else %} w97 "
    "{{ message.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} w97{% endif %}"
)
IMAGES = datasets.List(datasets.Image())


def tiny_processor(config, template=PLAIN_TEMPLATE):
    """A processor whose token w{i} has the id i, and whose image token is the config's."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, config.image_token_id)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return make_processor(config, tokenizer, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def picture(seed, size=(20, 16)):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def conversations(images=(1, 0, 2, 1)):
    """Samples of unequal length with one image, none and two."""
    rows = []
    for i, (count, answer) in enumerate(zip(images, ANSWERS, strict=True)):
        messages = [{"role": "user", "content": f"w20 w{21 + i}"}, {"role": "assistant", "content": answer}]
        rows.append({"images": [picture(10 * i + k) for k in range(count)], "messages": (1 + i % 2) * messages})
    return datasets.Dataset.from_list(
        rows,
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            }
        ),
    )
