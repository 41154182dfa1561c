"""Supervised fine-tuning of VW-LMM models: TRL's SFTTrainer and the visual-word loss."""

import copy
import math
from collections import defaultdict

import torch
from accelerate.utils import is_peft_model
from transformers import AutoProcessor, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path

from ..configuration_vwlmm import VWLmmConfig
from ..data.collator import VWLmmDataCollator
from ..data.load import columns_of, number_samples
from ..modeling_vwlmm import VWLmmForCausalLM
from ..stages import STAGES, train_only, trained_parts
from ..training_run import describe_run, read_training_run, write_training_run
from ..visual_word_loss import scored_positions
from .checkpoints import WholeCheckpoints
from .fused_head import add_visual_word_loss
from .hub_mixin import HubMixin
from .lora import for_language_model, keep_precision, skip_small_parts
from .sft_config import VWLmmSFTConfig


class VWLmmSFTTrainer(WholeCheckpoints, HubMixin, SFTTrainer):
    """TRL's [`~trl.SFTTrainer`] with the visual-word loss added to its own.

    With lambda the model config's `visual_word_loss_weight`, the loss is TRL's plus lambda times the mean of the
    visual-word loss over the scored image positions of all micro-batches and ranks of a step. At lambda = 0 training
    is TRL's, step by step. The log has both, `lm_loss` and `vw_loss` (0 where nothing is scored).

    Takes the arguments of [`~trl.SFTTrainer`], `args` a [`VWLmmSFTConfig`] and `model` a [`VWLmmForCausalLM`], or the
    name of one, or a PEFT model around one. `given` is for the record of the run, see [`describe_run`]: the name of
    the `dataset` and the `recipe`, which is what differs from the defaults of `args` if not given.
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
        given: dict | None = None,
        **kwargs,
    ):
        args = VWLmmSFTConfig() if args is None else args
        if not isinstance(args, VWLmmSFTConfig):
            raise TypeError(f"args must be a VWLmmSFTConfig, got a {type(args).__name__}")
        args = copy.copy(args)
        name = None
        if isinstance(model, str):
            name = model
            model = _load(model, args, kwargs.pop("quantization_config", None))
            own = VWLmmConfig.from_pretrained(name).pseudo_image_features
            if kwargs.get("peft_config") is not None and model.config.pseudo_image_features != own:
                raise ValueError(
                    f"an adapter has no config of its own, and that of {name} has pseudo_image_features {own}: change "
                    "it there"
                )
        base_model = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(base_model, VWLmmForCausalLM):
            raise TypeError(f"model must be a VWLmmForCausalLM, got a {type(base_model).__name__}")
        name = name or base_model.config.name_or_path
        # accelerate's FSDP looks for each of them in the model, but CLIP names parts of its text tower too
        classes = {type(module).__name__ for module in base_model.modules()}
        base_model._no_split_modules = set(base_model._no_split_modules) & classes
        kwargs["peft_config"] = self._set_stage(model, base_model, args, kwargs.get("peft_config"))
        bypasses = args.label_smoothing_factor or kwargs.get("compute_loss_func")
        if base_model.config.visual_word_loss_weight and bypasses:
            # TRL then takes the loss from full logits, and what its fused head returns for the log alone
            raise ValueError(
                "label_smoothing_factor and compute_loss_func leave the visual-word loss out: give "
                "visual_word_loss_weight=0 with them"
            )

        if processing_class is None:
            if not base_model.config.name_or_path:
                raise ValueError("a model that was not loaded from anywhere needs a processing_class")
            processing_class = AutoProcessor.from_pretrained(base_model.config.name_or_path)
        # Without images too, conversations are collated here, unless TRL's own text pipeline is asked for
        is_text = args.packing or args.padding_free or kwargs.get("formatting_func") is not None
        self._numbers_samples = isinstance(processing_class, ProcessorMixin) and not is_text
        if self._numbers_samples and train_dataset is not None:
            train_dataset, eval_dataset = number_samples(train_dataset), number_samples(eval_dataset)
        columns = [] if train_dataset is None else columns_of(train_dataset)
        assistant_only_loss = args.assistant_only_loss
        if assistant_only_loss is None:
            assistant_only_loss = "messages" in columns
        if data_collator is None and self._numbers_samples and {"image", "images"} & set(columns):
            tokenizer = processing_class.tokenizer
            tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
            data_collator = VWLmmDataCollator(
                processor=processing_class,
                max_length=args.max_length,
                completion_only_loss="prompt" in columns and args.completion_only_loss is not False,
                pad_to_multiple_of=args.pad_to_multiple_of,
                dataset_text_field=args.dataset_text_field,
                assistant_only_loss=assistant_only_loss,
                skip_broken_images=args.skip_broken_images,
            )
            # TRL would look for generation markers
            assistant_only_loss = False
        args.assistant_only_loss = assistant_only_loss
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._eval_sums = defaultdict(float)
        self._skipped_samples = {"train": 0, "eval": 0}
        peft_config = self.model.active_peft_config if is_peft_model(model) else kwargs["peft_config"]
        run = describe_run(
            name,
            base_model.config,
            args,
            trained_parts(base_model),
            peft_config,
            **{"recipe": args.given, **(given or {})},
        )
        self.stages = [*(read_training_run(name) if name else []), run]
        if is_peft_model(self.model) and not is_deepspeed_zero3_enabled():  # which takes one dtype alone
            keep_precision(self.model, has_autocast=args.bf16 or args.fp16)
        add_visual_word_loss(self.model.get_base_model() if is_peft_model(self.model) else self.model)

    @staticmethod
    def _set_stage(model, base_model, args, peft_config):
        fields = ("trainable", "visual_word_loss_weight", "visual_word_target", "detach_visual_words")
        given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
        settings = {**STAGES.get(args.stage, {}), **given}
        for name in fields[1:]:
            if name in settings:
                setattr(base_model.config, name, settings[name])
        if peft_config is not None:
            peft_config = for_language_model(peft_config, settings.get("trainable"))
        elif is_peft_model(model):
            if args.trainable is not None:
                raise ValueError(
                    "trainable chooses whole parts of a model, but a PEFT model has been told what trains"
                )
        elif "trainable" in settings:
            train_only(model, settings["trainable"])
        if _trains_only_the_vm_head(base_model):
            # There is no graph to checkpoint, and checkpointing would make one: it asks for gradients of the inputs
            args.activation_checkpointing = args.gradient_checkpointing = False
        return peft_config

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "id", "sample_index"})

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is not None and not is_peft_model(self.model):
            # Gathered from shards, tied weights are no longer known to be one
            tied = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_training_run(output_dir or self.args.output_dir, self.stages)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if self._numbers_samples and not isinstance(eval_dataset, str):
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

        if (is_skipped := inputs.pop("is_skipped", None)) is not None:
            self._count_skipped(is_skipped)
        loss = super().compute_loss(recording_model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = loss if return_outputs else (loss, None)
        lm_loss = loss.detach()
        vw_loss_sum = getattr(fused_outputs[0], "vw_loss_sum", None)
        if vw_loss_sum is None:
            vw_loss_sum, positions = torch.zeros_like(lm_loss), torch.zeros_like(lm_loss)
        else:
            vw_loss_sum = vw_loss_sum.to(lm_loss.device)
            positions = fused_outputs[0].vw_positions.to(lm_loss.device)
        if num_items_in_batch is None:
            vw_loss = vw_loss_sum / positions.clamp(min=1)
        else:
            # As TRL does for the tokens: counted over the ranks, whose gradients DDP averages
            vw_loss = vw_loss_sum / self._vw_positions_in_step.to(lm_loss.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                vw_loss = vw_loss * self.accelerator.num_processes
        loss = loss + self.model.config.visual_word_loss_weight * vw_loss

        if self.model.training:
            self._record_step(lm_loss, vw_loss.detach(), adds_to_step=num_items_in_batch is not None)
        else:
            tokens = fused_outputs[0].label_mask.sum()
            sums = {"tokens": tokens, "lm_loss": lm_loss * tokens, "positions": positions, "vw_loss": vw_loss_sum}
            for name, value in sums.items():
                self._eval_sums[name] += self.accelerator.reduce(value.detach(), "sum").item()
        return (loss, outputs) if return_outputs else loss

    def _count_skipped(self, is_skipped):
        mode = "train" if self.model.training else "eval"
        self._skipped_samples[mode] += self.accelerator.reduce(is_skipped.sum(), "sum").item()
        self._metrics[mode]["skipped_samples"] = [self._skipped_samples[mode]]

    def _record_step(self, lm_loss, vw_loss, adds_to_step):
        for name, value in (("lm_loss", lm_loss), ("vw_loss", vw_loss)):
            value = self.accelerator.reduce(value, "mean").item()
            if not math.isfinite(value):
                self.refuse_to_go_on(f"{name} is {value}")
            if adds_to_step:
                self._metrics["train"][name][-1] += value
            else:
                self._metrics["train"][name].append(value)

    def log(self, logs, start_time=None):
        if not self.model.training and self._eval_sums:
            # Means over all tokens and positions, whatever the batches
            sums, self._eval_sums = self._eval_sums, defaultdict(float)
            self._metrics["eval"]["lm_loss"] = [sums["lm_loss"] / max(sums["tokens"], 1)]
            self._metrics["eval"]["vw_loss"] = [sums["vw_loss"] / max(sums["positions"], 1)]
        super().log(logs, start_time)


def _load(name, args, quantization_config):
    """The model of that name, as TRL would load it, which looks for classes in transformers alone."""
    model_init_kwargs = dict(args.model_init_kwargs or {})
    args.model_init_kwargs = None
    if quantization_config is not None:
        model_init_kwargs["quantization_config"] = skip_small_parts(quantization_config)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        model_init_kwargs["device_map"] = None
    if args.deepspeed_plugin is not None:
        with set_zero3_state():  # whose modules have no weights: what is found here is remembered there
            VWLmmConfig.from_pretrained(name).image_feature_shape()
    model = create_model_from_path(name, VWLmmForCausalLM, **model_init_kwargs)
    if args.deepspeed_plugin is not None:
        model._weight_conversions = []  # loaded under ZeRO-3, it would be saved with stock LLaVA's names
    if model._hf_peft_config_loaded:
        raise ValueError(
            f"{name} is an adapter: to train what it makes of its base model, vwlmm merge {name} NEW_FOLDER"
        )
    return model


def _trains_only_the_vm_head(model):
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Pseudo image features pass through the VM head on their way to the LLM, so there its graph is needed
    return trained == ["model.vm_head.weight"] and not model.config.pseudo_image_features


__all__ = ["VWLmmSFTConfig", "VWLmmSFTTrainer"]
