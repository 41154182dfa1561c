"""Before the four stages: a tiny LLM that has read but never seen, and a new VW-LMM around it.

The LLM is trained on the text of easy-VQA's training questions and answers alone. Where an image will stand, its
documents have words: on a random rectangle of patches those that describe the image, on the others "image".
"""

import argparse
import random
import re

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ResNetConfig, set_seed
from trl import SFTConfig, SFTTrainer

from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM
from modeling_vwlmm.data import easy_vqa
from modeling_vwlmm.processing import make_processor
from modeling_vwlmm.training_run import write_training_run


SIDE = 4  # patches a side that an image becomes
BACKGROUND = "image"
CHAT_TEMPLATE = """{%- macro text(content) -%}
    {%- for part in ([{"type": "text", "text": content}] if content is string else content) -%}
        {{- " " + ("<image>" if part["type"] == "image" else part["text"]) -}}
    {%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}{{- text(message["content"]) + " " + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- text(message["content"]) -}}
    {%- endif -%}
{%- endfor -%}"""


def texts_of(row):
    """The texts of a conversation, of the user and the assistant in turn."""
    return ["".join(part["text"] or "" for part in message["content"]).strip() for message in row["messages"]]


def make_tokenizer(texts):
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


class Documents:
    """Documents that describe an image in words and answer questions about it, as token ids and labels.

    Questions that the description answers with its own words are as frequent as the others: they tell most, and are
    few among those of a single image.
    """

    def __init__(self, tokenizer, seed):
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.random = random.Random(seed)
        captions = {row["id"]: texts_of(row)[-1] for row in easy_vqa("train", "caption")}
        self.captions = list(captions.values())
        self.about = {caption: ([], []) for caption in self.captions}
        for row in easy_vqa("train", "conversation"):
            if row["id"] in captions:
                texts, caption = texts_of(row), captions[row["id"]]
                for question, answer in zip(texts[::2], texts[1::2], strict=True):
                    names_it = not set(caption.split()[1:]).isdisjoint(re.findall(r"\w+", f"{question} {answer}"))
                    self.about[caption][names_it].append((question, answer))

    def picture(self, color, shape):
        height, width = self.random.randint(1, SIDE - 1), self.random.randint(1, SIDE - 1)
        top, left = self.random.randint(0, SIDE - height), self.random.randint(0, SIDE - width)
        words = [BACKGROUND] * SIDE**2
        inside = [SIDE * y + x for y in range(top, top + height) for x in range(left, left + width)]
        for i, patch in enumerate(self.random.sample(inside, len(inside))):
            # Both words appear on two patches or more
            words[patch] = (color, shape)[i] if i < 2 else self.random.choice((color, shape))
        return words

    def caption(self):
        caption = self.random.choice(self.captions)
        words = self.picture(*caption.split()[1:])
        ids = self.encode(f"<s> {' '.join(words)} {caption} </s>")
        return {"input_ids": ids, "labels": ids}

    def conversation(self, turns=8):
        caption = self.random.choice(self.captions)
        ids = self.encode(f"<s> {' '.join(self.picture(*caption.split()[1:]))}")
        labels = [-100] * len(ids)
        for _ in range(turns):
            question, answer = self.random.choice(self.about[caption][self.random.random() < 0.5])
            question, answer = self.encode(question), self.encode(f"{answer} </s>")
            ids += question + answer
            labels += [-100] * len(question) + answer
        return {"input_ids": ids, "labels": labels}

    def dataset(self, documents):
        return Dataset.from_list([self.caption() if i % 4 == 3 else self.conversation() for i in range(documents)])


def train_llm(tokenizer, arguments):
    set_seed(arguments.seed)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    batch_size = 32
    recipe = {
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 50,
    }
    trainer = SFTTrainer(
        llm,
        SFTConfig(
            output_dir=arguments.output_dir, save_strategy="no", report_to="none", seed=arguments.seed, **recipe
        ),
        train_dataset=Documents(tokenizer, arguments.seed).dataset(batch_size * arguments.max_steps),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_state()
    # The record that the stages continue
    read = {"stage": "read_text", "dataset": "easy-vqa/conversation", "seed": arguments.seed}
    write_training_run(arguments.output_dir, [{**read, "recipe": {**recipe, "trainable": ["language_model"]}}])
    return llm


def build_around(llm, tokenizer):
    """A new VW-LMM around the LLM, with a small ResNet that has seen nothing."""
    llm.config.use_cache = True  # switched off by its training
    config = VWLmmConfig(
        vision_config=ResNetConfig(
            embedding_size=16,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            image_size=16 * SIDE,
        ),
        text_config=llm.config,
        image_token_index=llm.config.vocab_size,
        vision_feature_layer=-1,
    )
    model = VWLmmForCausalLM(config)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    with torch.no_grad():
        # An image starts as the word for one, which the LLM can read, and not as noise
        background = tokenizer.convert_tokens_to_ids(BACKGROUND)
        model.model.multi_modal_projector.linear_2.bias.copy_(llm.get_input_embeddings().weight[background])
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="runs/quickstart/start")
    parser.add_argument("--max_steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    conversations = easy_vqa("train", "conversation")
    captions = easy_vqa("train", "caption")
    tokenizer = make_tokenizer(text for rows in (conversations, captions) for row in rows for text in texts_of(row))
    llm = train_llm(tokenizer, arguments)
    set_seed(arguments.seed)
    model = build_around(llm, tokenizer)
    # Mean and deviation a colour channel of easy-VQA's training images
    processor = make_processor(model.config, tokenizer, image_mean=[0.90, 0.91, 0.90], image_std=[0.19, 0.19, 0.21])
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
