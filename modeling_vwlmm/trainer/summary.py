"""What is said before the first step of a training."""

from itertools import islice
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from datasets import IterableDataset

from ..stages import PARTS, missing_stage
from ..training_run import device_name
from .sft_config import VWLmmSFTConfig


if TYPE_CHECKING:
    from .sft_trainer import VWLmmSFTTrainer


def doubts_about(args: VWLmmSFTConfig, base_model: str, stages: list[dict], has_adapter: bool) -> list[str]:
    """What a recipe probably does not mean, a sentence each.

    Args:
        args: of the trainer.
        base_model: the name of the model that it starts from.
        stages: the record of the model and, last, of this run, see [`describe_run`].
        has_adapter: whether the model trains through an adapter, which says what trains.
    """
    *before, run = stages
    doubts = []
    if args.stage is None and args.trainable is None and not has_adapter:
        trained = ", ".join(run["trainable"])
        doubts.append(f"neither stage nor trainable is given, so that all of these train: {trained}")
    if missing := missing_stage(args.stage, before):
        done = ", ".join(str(record.get("stage")) for record in before)
        doubts.append(
            f'stage "{args.stage}" comes after "{missing}", which {base_model} has not been through: its record has '
            f"{done}"
        )
    return doubts


def summary_of(trainer: "VWLmmSFTTrainer") -> str:
    """What is about to run: device, model, what trains and on what; a line each."""
    args = trainer.args
    model: Any = trainer.model
    config = model.config
    base_model = model.get_base_model() if is_peft_model(model) else model
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(base_model.dtype).removeprefix("torch.")
    counts = {}
    for part, names in PARTS.items():
        parameters = [parameter for name in names for parameter in base_model.get_submodule(name).parameters()]
        # A tied head is one of them twice
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


def _data(trainer):
    args, dataset = trainer.args, trainer.train_dataset
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(dataset, IterableDataset) or trainer.data_collator is None:
        return f"a stream, {a_step} samples a step"
    batch = trainer.data_collator([dict(row) for row in islice(dataset, args.per_device_train_batch_size)])
    tokens = batch["attention_mask"].sum().item() * a_step // len(batch["attention_mask"])
    return f"{len(dataset):,} samples, {a_step} a step, about {tokens:,} tokens a step"
