"""Supervised fine-tuning of VW-LMM models: TRL's SFTTrainer with the visual-word loss."""

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl import SFTTrainer

from ..data.collator import OtherCollator, VWLmmDataCollator
from ..data.load import columns_of, number_samples
from ..data.reading import ReadingCollator
from ..files import reading, remove_code
from ..hub.card import write_card
from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import check_processor
from ..stages import trained_parts
from ..template_check import check_template
from ..training_run import describe_run, fingerprint, read_training_run, write_training_run
from ..visual_word_loss import scored_positions
from .batches import PackedBatches, check_batches, collator_of
from .checkpoints import WholeCheckpoints
from .fused_head import add_visual_word_loss
from .generation_eval import GenerationEval, sample_of
from .hub_mixin import HubMixin
from .lora import keep_precision
from .model import (
    check_adapter_config,
    doubts_about,
    hub_arguments,
    load_model,
    set_stage,
    start_projector,
    trains_only_the_vm_head,
)
from .reach import freeze_biases_outside
from .sample_attention import attend_by_sample
from .sft_config import VWLmmSFTConfig


logger = logging.get_logger(__name__)


class VWLmmSFTTrainer(WholeCheckpoints, PackedBatches, HubMixin, SFTTrainer):
    """TRL's [`~trl.SFTTrainer`] with the visual-word loss added to its own.

    With lambda the model config's `visual_word_loss_weight`, the loss is TRL's plus lambda times the mean of the
    visual-word loss over the scored image positions of all micro-batches and ranks of a step. At lambda = 0 training
    is TRL's, step by step. Where only the VM head trains, the loss of the text cannot fall, so that it is left out.
    The log has both, `lm_loss` and `vw_loss` (0 where nothing is scored).

    Args:
        model ([`VWLmmForCausalLM`], [`~peft.PeftModel`] or `str`): the model, an adapter around it, or its name.
        args ([`VWLmmSFTConfig`], *optional*): settings.
        data_collator, train_dataset, eval_dataset, processing_class: as in TRL. Without a `data_collator`, data with
            images gets a [`VWLmmDataCollator`]; without a `processing_class`, the model's own processor is loaded.
        run_record (`dict`, *optional*): what the record of the run says beside what the trainer knows, see
            [`describe_run`]: the name of the `dataset`, and the `recipe` instead of what differs from the defaults.
        kwargs: the other arguments of TRL's trainer.

    Raises:
        TypeError: `args` or `model` is of another class.
        ValueError: settings do not fit each other or the model.
    """

    _name = "VW-LMM"
    _tag_names = ["trl", "sft", "vwlmm"]

    def __init__(
        self,
        model: VWLmmForCausalLM | PeftModel | str,
        args: VWLmmSFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        run_record: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        args = VWLmmSFTConfig() if args is None else args
        if not isinstance(args, VWLmmSFTConfig):
            raise TypeError(f"args must be a VWLmmSFTConfig, got a {type(args).__name__}")
        args = copy.copy(args)
        peft_config, name = kwargs.pop("peft_config", None), None
        hub = hub_arguments(args) if isinstance(model, str) else {}
        if isinstance(model, str):
            name, model = model, load_model(model, args, peft_config, kwargs.pop("quantization_config", None))
        base_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base_model, VWLmmForCausalLM):
            raise TypeError(f"model must be a VWLmmForCausalLM, got a {type(base_model).__name__}")
        name = name or base_model.config.name_or_path
        is_whole = getattr(base_model, "hf_quantizer", None) is None and not is_deepspeed_zero3_enabled()
        base_fingerprint = fingerprint(base_model) if is_whole and not is_peft_model(model) else None
        peft_config = set_stage(model, args, peft_config)
        if peft_config is not None:
            check_adapter_config(name, base_model, **hub)
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
            with reading(f"the processor of {base_model.config.name_or_path}"):
                processing_class = AutoProcessor.from_pretrained(
                    base_model.config.name_or_path, trust_remote_code=False, **hub
                )
            check_template(processing_class, base_model.config.name_or_path)
        # TRL's own pipeline for text tokenizes beforehand, and is used where it is asked for
        is_text = kwargs.get("formatting_func") is not None
        # Another collator gets its rows as they are, with images that are open
        is_ours = data_collator is None or isinstance(data_collator, VWLmmDataCollator)
        self._numbers_samples = isinstance(processing_class, ProcessorMixin) and is_ours and not is_text
        columns = []
        if isinstance(train_dataset, (Dataset, IterableDataset)):  # TRL refuses anything else
            if self._numbers_samples:
                train_dataset, eval_dataset = number_samples(train_dataset), number_samples(eval_dataset)
            columns = columns_of(train_dataset)
        if args.assistant_only_loss is None:
            # TRL's default elsewhere: it looks for markers in the template, and a function makes texts without turns
            makes_texts = kwargs.get("formatting_func") is not None or not isinstance(processing_class, ProcessorMixin)
            args.assistant_only_loss = "messages" in columns and is_ours and not makes_texts
        asked = args.packing, args.padding_free
        has_images = bool({"image", "images"} & set(columns))
        if has_images:
            adapter = model.active_peft_config if is_peft_model(model) else peft_config
            check_batches(args, train_dataset, data_collator, adapter)
        if data_collator is None and self._numbers_samples and has_images:
            data_collator = collator_of(args, processing_class, columns, base_model.config)
            # TRL would refuse both, which the collator sees to
            self.packs_rows, args.packing, args.padding_free = args.packing, False, False
        elif not is_ours:
            data_collator = OtherCollator(data_collator, base_model.config.image_token_id)
        if args.stage == "read" and not isinstance(data_collator, ReadingCollator):
            raise ValueError('stage "read" makes its own batches: leave out data_collator and formatting_func')
        if args.projector_from_words:
            start_projector(model, args, processing_class, train_dataset)
        if isinstance(data_collator, VWLmmDataCollator):
            processor: Any = data_collator.processor
            check_processor(processor, base_model.config)
            # The collator finds what the assistant says. TRL would look for generation markers
            args.assistant_only_loss = False
        if isinstance(train_dataset, IterableDataset):
            # A run that goes on counts batches from the beginning, over all passes: transformers would look for all of
            # them in the first pass
            train_dataset = train_dataset.repeat(None)
        questions = sample_of(eval_dataset, processing_class, args) if args.generation_eval_steps else None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        args.packing, args.padding_free = asked
        if getattr(self.data_collator, "padding_free", False):
            parallelism = self.accelerator.parallelism_config
            if parallelism is not None and parallelism.cp_enabled:
                raise ValueError("context parallelism would let samples of a row read each other: no padding_free")
            attend_by_sample(base_model)
        if peft_config is not None:
            freeze_biases_outside(self.model, peft_config)
        if questions is not None:
            self.add_callback(GenerationEval(self, questions))
        self._eval_sums: dict[str, float] = defaultdict(float)
        self._skipped_samples = {"train": 0, "eval": 0}
        self.scores_text = not trains_only_the_vm_head(base_model)
        run_record = {"recipe": args.given_fields, **(run_record or {})}
        if is_peft_model(model):
            peft_config = model.active_peft_config
        if args.save_only_trained:  # an adapter of whole parts, about which PEFT's settings say nothing
            peft_config = None
        run = describe_run(
            name, base_model.config, args, trained_parts(base_model), peft_config, base_fingerprint, **run_record
        )
        self.stages = [*(read_training_run(name, **hub) if name else []), run]
        for doubt in doubts_about(args, name, self.stages, is_peft_model(self.model)):
            logger.warning(doubt)
        # ZeRO-3 takes one dtype alone
        if is_peft_model(self.model) and not is_deepspeed_zero3_enabled():
            keep_precision(self.model, has_autocast=args.bf16 or args.fp16)
        add_visual_word_loss(base_model)

    def train(self, *args, **kwargs):
        rows = self.packed_rows if self.packs_rows else self.train_dataset
        self.args.check_amount(None if isinstance(rows, IterableDataset) else len(rows))
        return super().train(*args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, "id", "sample_index"})
        if isinstance(self.data_collator, VWLmmDataCollator):  # which reads texts with images too, as TRL's does
            self._signature_columns += [self.args.dataset_text_field, "tools", "chat_template_kwargs"]

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is not None and not is_peft_model(self.model):
            # Gathered from shards, tied weights are no longer known to be one
            tied = self.model.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        token, self.args.hub_token = self.args.hub_token, None  # training_args.bin would hold it
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            remove_code(output_dir or self.args.output_dir)
            write_training_run(output_dir or self.args.output_dir, self.stages)

    def create_model_card(self, *args, **kwargs):
        """Write the card of the run into its folder, see [`write_card`], unless it is a checkpoint that is saved.

        TRL would write its own, which knows nothing of the stages. A model that is sharded is loaded anew for it.
        """
        if self._is_saving or not self.is_world_process_zero():
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            write_card(self.args.output_dir)
            return
        model = self.accelerator.unwrap_model(self.model)
        write_card(self.args.output_dir, model=model.get_base_model() if is_peft_model(model) else model)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if self._numbers_samples and not isinstance(eval_dataset, str):
            eval_dataset = number_samples(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_test_dataloader(self, test_dataset):
        collator, dataset = self.data_collator, number_samples(test_dataset) if self._numbers_samples else test_dataset
        if isinstance(collator, VWLmmDataCollator):  # what is to be predicted may lack answers
            self.data_collator = copy.copy(collator)
            self.data_collator.needs_labels = self.data_collator.padding_free = False  # a prediction is of a row
        try:
            return super().get_test_dataloader(dataset)
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        image_token_id = self.model.config.image_token_id
        positions = sum(
            scored_positions(
                batch["input_ids"] == image_token_id, batch.get("attention_mask"), batch.get("position_ids")
            ).sum()
            for batch in batch_samples
        )
        positions = torch.as_tensor(positions, device=device)
        if self.args.average_tokens_across_devices:
            positions = self.accelerator.reduce(positions, "sum")
        self._vw_positions_in_step = positions
        for name in ("lm_loss", "vw_loss") if batch_samples else ():
            self._metrics["train"][name].append(0.0)  # one entry a step; each micro-batch adds its share
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
        weighted = self.model.config.visual_word_loss_weight * vw_loss
        loss = loss + weighted if self.scores_text else weighted

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

    def _inner_training_loop(self, *args, **kwargs):
        # With auto_find_batch_size it begins anew, and what the first try recorded is no part of the log
        self._metrics["train"].clear()
        self._total_train_tokens = 0
        return super()._inner_training_loop(*args, **kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._eval_sums = defaultdict(float)
        self._metrics["eval"].clear()  # of a prediction, which TRL logs nowhere
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Means over all tokens and positions, whatever the batches. transformers' own loss is a mean over batches
        sums, self._eval_sums = self._eval_sums, defaultdict(float)
        losses = {
            "lm_loss": sums["lm_loss"] / max(sums["tokens"], 1),
            "vw_loss": sums["vw_loss"] / max(sums["positions"], 1),
        }
        text = losses["lm_loss"] if self.scores_text else 0.0
        losses["loss"] = text + self.model.config.visual_word_loss_weight * losses["vw_loss"]
        if not sums["tokens"]:  # a prediction of rows without answers
            del losses["lm_loss"]
        if sums:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in losses.items()})
        return output


__all__ = ["VWLmmSFTTrainer"]
