"""The stage before the four: the LLM reads about images before it sees any.

Conversations about images are rendered as they will be in training, but where an image will stand there are words: on
a random rectangle of its patches the words that the assistant says of it, around it words for a background. The LLM
learns the answers, and to expect a word where the next patch will be. Any conversations in LLaVA's JSON will do.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from datasets import concatenate_datasets
from transformers import AutoProcessor
from trl import TrlParser

from modeling_vwlmm.data import load_conversations
from modeling_vwlmm.data.collator import VWLmmDataCollator
from modeling_vwlmm.modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.trainer import VWLmmSFTConfig, VWLmmSFTTrainer


# More than two, and none of them about a thing: what is always probable must not fill the top three of every patch
BACKGROUND = ["background", "blank", "empty", "space"]
STOP_WORDS = set(
    "a about after all also an and any are as at be been but by can do does for from had has have he her his how i if "
    "in into is it its just let like made more most my no not of off on one only or other our out over picture shown "
    "she so some than that the their them then there these they this to two up very was were what when which who will "
    "with yes you your".split()
)


def words_of(messages):
    """The words that the assistant says, but for yes, no and other words that name nothing; in order, each once."""
    said = " ".join(
        part["text"] or "" for message in messages if message["role"] == "assistant" for part in message["content"]
    )
    words = re.findall(r"[a-z]{3,}", said.lower())
    return [word for word in dict.fromkeys(words) if word not in STOP_WORDS]


def token_of(word, tokenizer):
    """The token of a word in a sentence, None if it takes several."""
    ids = tokenizer.encode(f" {word}", add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


@dataclass
class ReadingCollator(VWLmmDataCollator):
    """Batches of [`VWLmmDataCollator`] with words where the images were, some of which are labels too."""

    side: int = 5
    labels: int = 8
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.random = random.Random(self.seed)
        tokens = (token_of(word, self.processor.tokenizer) for word in BACKGROUND)
        self.background = [token for token in tokens if token is not None]

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch.pop("pixel_values", None)
        for row, example in enumerate(examples):
            places = (batch["input_ids"][row] == self.image_token_id).nonzero().flatten()
            for start in range(0, len(places), self.side**2):
                patches = places[start : start + self.side**2]
                batch["input_ids"][row, patches] = torch.tensor(self.picture(words_of(example["messages"])))
                # Some are enough to learn from, and the head is the dearest part of a step
                chosen = patches[self.random.sample(range(len(patches)), min(self.labels, len(patches)))]
                batch["labels"][row, chosen] = batch["input_ids"][row, chosen]
        return batch

    def picture(self, words):
        """Token ids of the words on a rectangle of patches, row by row."""
        ids = [token for word in words if (token := token_of(word, self.processor.tokenizer)) is not None]
        height, width = self.random.randint(2, self.side), self.random.randint(2, self.side)
        top, left = self.random.randint(0, self.side - height), self.random.randint(0, self.side - width)
        return [
            self.random.choice(ids)
            if ids and top <= place // self.side < top + height and left <= place % self.side < left + width
            else self.random.choice(self.background)
            for place in range(self.side**2)
        ]


@dataclass
class ReadArguments:
    model: str = field(metadata={"help": "Folder of the model to start from."})
    dataset: list[str] = field(metadata={"help": "Conversations in LLaVA's JSON, one file or several."})
    image_folder: str = field(metadata={"help": "Folder of the images that it names."})


@torch.no_grad()
def start_projector(model, tokenizer, dataset, background):
    """Let the projector start as a dictionary, whose hidden units stand for the most frequent words of the data.

    Its output is at first the words for a background, which the LLM can read, and each unit adds the embedding of its
    word to that.
    """
    counts = Counter(word for row in dataset for word in words_of(row["messages"]))
    tokens = [token for word, _ in counts.most_common() if (token := token_of(word, tokenizer)) is not None]
    embeddings, projector = model.get_input_embeddings().weight, model.model.multi_modal_projector
    start = embeddings[background].mean(0)
    tokens = tokens[: projector.linear_2.in_features]
    projector.linear_1.weight.mul_(0.1)  # otherwise many words at once would be louder than the background
    projector.linear_2.bias.copy_(start)
    projector.linear_2.weight[:, : len(tokens)] = (embeddings[tokens] - start).t()
    print(f"the projector knows {len(tokens)} words")


def main(argv=None):
    parser = TrlParser((ReadArguments, VWLmmSFTConfig))
    arguments, config = parser.parse_args_and_config(argv)
    processor = AutoProcessor.from_pretrained(arguments.model)
    # Eager attention is the faster one on a CPU for so few tokens
    model = VWLmmForCausalLM.from_pretrained(arguments.model, attn_implementation={"text_config": "eager"})
    names = arguments.dataset
    dataset = concatenate_datasets([load_conversations(name, arguments.image_folder) for name in names])
    trainer = VWLmmSFTTrainer(
        model,
        config,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=ReadingCollator(
            processor=processor,
            max_length=config.max_length,
            side=round(model.config.image_seq_length**0.5),
            seed=config.seed,
        ),
        run_record={"stage": "read", "dataset": ", ".join(names)},
    )
    trainer.train()
    start_projector(model, processor.tokenizer, dataset, trainer.data_collator.background)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
