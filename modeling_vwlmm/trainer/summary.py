"""What is said before the first step of a training."""

from itertools import islice
from typing import Any

from accelerate.utils import is_peft_model
from datasets import IterableDataset

from ..stages import PARTS
from ..training_run import device_name
from .sft_trainer import VWLmmSFTTrainer


def summary_of(trainer: VWLmmSFTTrainer) -> str:
    """What is about to run: device, model, what trains and on what; a line each."""
    args = trainer.args
    model: Any = trainer.model
    config = model.config
    base_model = model.get_base_model() if is_peft_model(model) else model
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(base_model.dtype).removeprefix("torch.")
    counts = {}
    for part, names in PARTS.items():
        parameters = [parameter for name in names for parameter in base_model.get_submodule(name).parameters()]
        # A tied head shares its weight with the embeddings: it counts once
        counts[part] = sum({id(p): p.numel() for p in parameters if p.requires_grad}.values())
    trained = ", ".join(f"{part} ({count:,} weights)" for part, count in counts.items() if count)
    losses = ["text"] if trainer.scores_text else []
    if config.visual_word_loss_weight:
        pair = ("LLM", "visual word") if config.visual_word_target == "language_model" else ("visual word", "LLM")
        losses.append(f"{config.visual_word_loss_weight:g} KL({' || '.join(pair)})")
    reads = ", as pseudo image features" if config.pseudo_image_features else ""
    return "\n".join(
        [
            f"  device  {device_name(args)}, {args.world_size} process(es), {dtype}",
            f"  model   {config.vision_config.model_type}, layer {config.vision_feature_layer}: "
            f"{config.image_seq_length} patches an image; {config.text_config.model_type} reads them{reads}",
            f"  trains  {trained}",
            f"  loss    {' + '.join(losses)}",
            f"  data    {_data(trainer)}",
        ]
    )


def _data(trainer: VWLmmSFTTrainer) -> str:
    args = trainer.args
    dataset: Any = trainer.train_dataset
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    names = trainer.stages[-1].get("dataset")
    source = f" of {', '.join(names)}" if isinstance(names, list) else ""
    if isinstance(dataset, IterableDataset):
        return f"a stream{source}, {a_step} samples a step"
    if trainer.packs_rows:
        rows, limit = len(trainer.packed_rows), args.max_length
        left = 1 - trainer.token_counts.sum() / (rows * limit)
        packed = f"in {rows:,} rows of {limit:,} tokens, {left:.1%} left over, {a_step} rows a step"
        return f"{len(dataset):,} samples{source} {packed}"
    samples = f"{len(dataset):,} samples{source}, {a_step} a step"
    try:
        batch = trainer.data_collator([dict(row) for row in islice(dataset, args.per_device_train_batch_size)])
    except (ValueError, IndexError):  # training will raise it where it meets this sample, or a batch of none
        return samples
    mask = batch.get("attention_mask")  # TRL lays packed rows one after another, without one
    tokens = mask.sum().item() if mask is not None else batch["input_ids"].numel()
    tokens = tokens * a_step // min(args.per_device_train_batch_size, len(dataset))
    return f"{samples}, about {tokens:,} tokens a step"
