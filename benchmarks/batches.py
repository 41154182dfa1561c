"""What padding costs: batches of samples as long as those of LLaVA-1.5's mix, each with its images.

Text has 30 to 1,500 tokens, log-normal with the median 212 (the middle of the two on a logarithmic scale) and the
standard deviation 1 of the logarithm; nine samples in ten have an image of 576 patches.
"""

import math

import numpy as np
import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage
from transformers import PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from variants import Meter, build, processor_of

from modeling_vwlmm.data.packing import best_fit
from modeling_vwlmm.trainer import VWLmmSFTConfig, VWLmmSFTTrainer


PATCHES, SHORTEST, LONGEST = 576, 30, 1500
BATCH_SIZE, ROW = 4, 4096
DRAWN = 100_000  # lengths that shares of padding are of
TRAINED = 12  # samples that time is of
BATCHES = {
    "padded": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "padding-free": {"padding_free": True},
    # A row of as many tokens as the others' batches have about
    "packed": {"packing": True, "max_length": ROW, "per_device_train_batch_size": 1},
}


def drawn(count):
    """The tokens of text of each sample, and whether it has an image."""
    generator = np.random.default_rng(0)
    text = np.exp(generator.normal(math.log(math.sqrt(SHORTEST * LONGEST)), 1.0, count))
    return np.clip(text, SHORTEST, LONGEST).astype(int), generator.random(count) < 0.9


def shares_of_padding():
    """The share of a batch that is padding, or of a row that is left over, by name."""
    text, has_image = drawn(DRAWN)
    lengths = text + PATCHES * has_image

    def share(order):
        batches = lengths[np.array(order)].reshape(-1, BATCH_SIZE)
        return 1 - batches.sum() / (BATCH_SIZE * batches.max(1).sum())

    grouped = get_length_grouped_indices(lengths.tolist(), BATCH_SIZE, generator=torch.Generator().manual_seed(0))
    shares = {"padded": share(range(DRAWN)), "grouped": share(grouped), "padding-free": 0.0}
    for row in (ROW, 2048):
        rows = best_fit(lengths, row, seed=0)
        shares[f"packed into {row}"] = 1 - np.minimum(lengths, row).sum() / (row * len(rows))
    return shares


def dataset():
    pixels = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    rows = []
    for tokens, has_image in zip(*drawn(TRAINED), strict=True):
        said = [" ".join(f"w{10 + i % 900}" for i in range(count)) for count in (tokens // 4, tokens - tokens // 4)]
        rows.append(
            {
                "images": [PILImage.fromarray(pixels)] * int(has_image),
                "prompt": [{"role": "user", "content": said[0]}],
                "completion": [{"role": "assistant", "content": said[1]}],
            }
        )
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def epoch(pipe, spec):
    """Trains on all samples when it is told to; sends seconds, peak bytes, and the tokens with and without padding."""
    meter = Meter(spec["device"])
    arguments = {"per_device_train_batch_size": BATCH_SIZE, "max_length": None, **BATCHES[spec["batches"]]}
    trainer = VWLmmSFTTrainer(
        build(spec, is_ours=True),
        VWLmmSFTConfig(output_dir=spec["batches"], stage=spec["stage"], num_train_epochs=1, report_to="none",
                       save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=spec["device"] == "cpu",
                       bf16=spec["dtype"] == "bfloat16", **arguments),
        train_dataset=dataset(),
        processing_class=processor_of(spec),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    padded = tokens = 0
    for batch in trainer.get_train_dataloader():
        padded += batch["input_ids"].numel()
        tokens += batch["attention_mask"].sum().item() if "attention_mask" in batch else batch["input_ids"].numel()
    trainer.args.max_steps = 1  # the first step makes what the others reuse
    trainer.train()
    trainer.args.max_steps = -1
    pipe.send("ready")
    while pipe.recv() == "go":
        meter.start()
        trainer.train()
        pipe.send((*meter.stop(), tokens, padded))
