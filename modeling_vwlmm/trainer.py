"""Supervised fine-tuning of VW-LMM models: TRL's SFTTrainer and the visual-word loss."""

import functools
import types
from dataclasses import dataclass, field

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoProcessor, ProcessorMixin
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from .collator import VWLmmDataCollator
from .modeling_vwlmm import VWLmmForCausalLM
from .visual_word_loss import scored_positions


PARTS = {
    "vision_tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language_model": ("model.language_model", "lm_head"),
    "vm_head": ("model.vm_head",),
}


STAGES = {
    "align": {"trainable": ["projector"], "visual_word_loss_weight": 0.0},
    "instruct": {"trainable": ["projector", "language_model"], "visual_word_loss_weight": 0.0},
    "visual_words": {
        "trainable": ["vm_head"],
        "visual_word_loss_weight": 1.0,
        "visual_word_target": "language_model",
    },
    "joint": {
        "trainable": ["projector", "language_model"],
        "visual_word_loss_weight": 1.0,
        "visual_word_target": "visual_words",
    },
}


@dataclass
class VWLmmSFTConfig(SFTConfig):
    """TRL's [`~trl.SFTConfig`], with fields of its own for what VW-LMM's stages differ in.

    Args:
        stage (`str`, *optional*):
            One of the paper's four, `"align"`, `"instruct"`, `"visual_words"` and `"joint"`: it sets those of the
            fields below that are not given.
        trainable (`list[str]`, *optional*):
            Which parts train, of `"vision_tower"`, `"projector"`, `"language_model"` (its head included) and
            `"vm_head"`; the others are frozen. The model's own `requires_grad` if not given.
        visual_word_loss_weight (`float`, *optional*), visual_word_target (`str`, *optional*),
        detach_visual_words (`bool`, *optional*):
            Written into the model's config, see [`VWLmmConfig`]. Left as they are there if not given.
        assistant_only_loss (`bool`, *optional*, defaults to `True`):
            Whether `messages` are scored on what the assistant says alone, with any chat template.
    """

    stage: str | None = field(
        default=None, metadata={"help": "align, instruct, visual_words or joint: sets the fields below if not given."}
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={"help": "Parts that train, of vision_tower, projector, language_model, vm_head. All if not given."},
    )
    visual_word_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the visual-word loss. The model config's if not given."}
    )
    visual_word_target: str | None = field(
        default=None,
        metadata={
            "help": "'visual_words' for joint training, 'language_model' for VM-head training. The model config's if "
            "not given."
        },
    )
    detach_visual_words: bool | None = field(
        default=None,
        metadata={"help": "Stop the gradient through the visual words as target. The model config's if not given."},
    )
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Whether to compute the text loss only on what the assistant says."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.stage is not None:
            if self.stage not in STAGES:
                raise ValueError(f'stage is "{self.stage}", expected one of {", ".join(STAGES)}')
            for name, value in STAGES[self.stage].items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        unknown = set(self.trainable or []) - set(PARTS)
        if unknown or self.trainable == []:
            raise ValueError(f"trainable is {self.trainable}, expected one or more of {', '.join(PARTS)}")
        if self.visual_word_target not in (None, "visual_words", "language_model"):
            raise ValueError(
                f'visual_word_target is "{self.visual_word_target}", expected "visual_words" or "language_model"'
            )


@dataclass
class FusedVWLmmOutput(FusedCausalLMOutput):
    """What TRL's fused LM head returns, the sum of the visual-word loss and the number of positions it scores."""

    vw_loss_sum: torch.Tensor | None = None
    vw_positions: torch.Tensor | None = None


def add_visual_word_loss(model):
    """Let `model(..., fused_lm_head=True)`, patched in by TRL, return the visual-word loss too.

    TRL's patch runs the backbone and keeps nothing of it but the log-probabilities of the labels. The loss is taken
    from the same run of the backbone, inside the model's forward, where DDP and FSDP have its weights ready.
    """
    fused_forward = model.forward

    @functools.wraps(fused_forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head or not self.config.visual_word_loss_weight:
            return fused_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        backbone_outputs = []
        hook = self.model.register_forward_hook(lambda module, inputs, outputs: backbone_outputs.append(outputs))
        try:
            outputs = fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        if backbone_outputs[0].image_hidden_states is None:
            return outputs
        vw_loss_sum, vw_positions = self.visual_word_loss(backbone_outputs[0], kwargs.get("attention_mask"))
        return FusedVWLmmOutput(**outputs, vw_loss_sum=vw_loss_sum, vw_positions=vw_positions)

    model.forward = types.MethodType(forward, model)


def number_samples(dataset):
    """The dataset with a column `sample_index` for error messages, and a column of images if it holds only texts."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: number_samples(part) for name, part in dataset.items()}
    columns = dataset.column_names or next(iter(dataset)).keys()
    if not {"messages", "prompt", "image", "images"} & set(columns) or "sample_index" in columns:
        return dataset
    without_images = not {"image", "images"} & set(columns)
    if isinstance(dataset, Dataset):
        if without_images:
            dataset = dataset.add_column("images", [[] for _ in range(len(dataset))])
        return dataset.add_column("sample_index", list(range(len(dataset))))
    return dataset.map(
        lambda example, index: {
            **example,
            "sample_index": index,
            **({"images": []} if without_images else {}),
        },
        with_indices=True,
    )


class VWLmmSFTTrainer(SFTTrainer):
    """TRL's [`~trl.SFTTrainer`] with the visual-word loss added to its own.

    With lambda the model config's `visual_word_loss_weight`, the loss is TRL's plus lambda times the mean of the
    visual-word loss over the scored image positions of all micro-batches and ranks of a step. At lambda = 0 training
    is TRL's, step by step. The log has both, `lm_loss` and `vw_loss` (0 where nothing is scored).

    Takes the arguments of [`~trl.SFTTrainer`], `args` a [`VWLmmSFTConfig`] and `model` a [`VWLmmForCausalLM`], or the
    name of one, or a PEFT model around one.
    """

    _name = "VW-LMM"
    _tag_names = ["trl", "sft", "vwlmm"]

    def __init__(
        self,
        model,
        args: VWLmmSFTConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = VWLmmSFTConfig() if args is None else args
        if not isinstance(args, VWLmmSFTConfig):
            raise TypeError(f"args must be a VWLmmSFTConfig, got a {type(args).__name__}")
        if isinstance(model, str):
            # TRL looks for classes in transformers alone
            model = VWLmmForCausalLM.from_pretrained(
                model, **{"dtype": torch.float32, **(args.model_init_kwargs or {})}
            )
            args.model_init_kwargs = None
        base_model = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(base_model, VWLmmForCausalLM):
            raise TypeError(f"model must be a VWLmmForCausalLM, got a {type(base_model).__name__}")
        for name in ("visual_word_loss_weight", "visual_word_target", "detach_visual_words"):
            if getattr(args, name) is not None:
                setattr(base_model.config, name, getattr(args, name))
        if args.trainable is not None:
            if is_peft_model(model) or kwargs.get("peft_config") is not None:
                raise ValueError("trainable chooses whole parts of a model: with PEFT, use its modules_to_save")
            train_only(model, args.trainable)
        if _trains_only_the_vm_head(base_model):
            # There is no graph to checkpoint, and checkpointing would make one: it asks for gradients of the inputs
            args.activation_checkpointing = args.gradient_checkpointing = False

        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(base_model.config.name_or_path)
        train_dataset, eval_dataset = number_samples(train_dataset), number_samples(eval_dataset)
        if data_collator is None and isinstance(processing_class, ProcessorMixin) and _has_images(train_dataset):
            tokenizer = processing_class.tokenizer
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            data_collator = VWLmmDataCollator(
                processor=processing_class,
                max_length=args.max_length,
                completion_only_loss="prompt" in train_dataset.column_names and args.completion_only_loss is not False,
                pad_to_multiple_of=args.pad_to_multiple_of,
                dataset_text_field=args.dataset_text_field,
                assistant_only_loss=args.assistant_only_loss,
            )
        assistant_only_loss = args.assistant_only_loss
        # The collator sees to it, for templates too in which TRL finds no generation markers
        args.assistant_only_loss = assistant_only_loss and data_collator is None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        args.assistant_only_loss = assistant_only_loss
        add_visual_word_loss(self.model.get_base_model() if is_peft_model(self.model) else self.model)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "id", "sample_index"})

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if not isinstance(eval_dataset, str):
            eval_dataset = number_samples(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        image_token_id = self.model.config.image_token_id
        positions = sum(
            scored_positions(batch["input_ids"] == image_token_id, batch.get("attention_mask")).sum()
            for batch in batch_samples
        )
        positions = torch.as_tensor(positions, device=device)
        if self.args.average_tokens_across_devices:
            positions = self.accelerator.reduce(positions, "sum")
        self._vw_positions_in_step = positions
        for name in ("lm_loss", "vw_loss") if batch_samples else ():
            self._metrics["train"][name].append(0.0)  # an entry a step, to which its micro-batches add
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        fused_outputs = []

        def recording_model(**kwargs):
            outputs = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                fused_outputs.append(outputs)
            return outputs

        loss = super().compute_loss(recording_model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = loss if return_outputs else (loss, None)
        lm_loss = loss.detach()
        vw_loss = torch.zeros_like(lm_loss)
        if getattr(fused_outputs[0], "vw_loss_sum", None) is not None:
            vw_loss = fused_outputs[0].vw_loss_sum
            if num_items_in_batch is None:
                vw_loss = vw_loss / fused_outputs[0].vw_positions.clamp(min=1)
            else:
                # As TRL does for the tokens: counted over the ranks, whose gradients DDP averages
                vw_loss = vw_loss / self._vw_positions_in_step.clamp(min=1)
                if self.args.average_tokens_across_devices:
                    vw_loss = vw_loss * self.accelerator.num_processes
            loss = loss + self.model.config.visual_word_loss_weight * vw_loss
        self._record("lm_loss", lm_loss, add=num_items_in_batch is not None)
        self._record("vw_loss", vw_loss.detach(), add=num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def _record(self, name, value, add):
        value = self.accelerator.reduce(value, "mean").item()
        values = self._metrics["train" if self.model.training else "eval"][name]
        if add:
            values[-1] += value
        else:
            values.append(value)


def train_only(model, parts):
    """Freeze all of a [`VWLmmForCausalLM`] but the named parts, keys of `PARTS`."""
    model.requires_grad_(False)
    for part in parts:
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(True)


def _trains_only_the_vm_head(model):
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Pseudo image features pass through the VM head on their way to the LLM, so there its graph is needed
    return trained == ["model.vm_head.weight"] and not model.config.pseudo_image_features


def _has_images(dataset):
    return dataset is not None and bool({"image", "images"} & set(dataset.column_names or next(iter(dataset)).keys()))


__all__ = ["VWLmmSFTConfig", "VWLmmSFTTrainer"]
