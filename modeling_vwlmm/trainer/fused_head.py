"""The visual-word loss in TRL's fused LM head, for one run of the backbone to give both losses."""

import functools
import types
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from ..modeling_vwlmm import VWLmmForCausalLM


@dataclass
class FusedVWLmmOutput(FusedCausalLMOutput):
    """TRL's output, with the sum of the visual-word loss and the number of positions that it scores."""

    vw_loss_sum: torch.Tensor | None = None
    vw_positions: torch.Tensor | None = None


def add_visual_word_loss(model: VWLmmForCausalLM) -> None:
    """Make `model(..., fused_lm_head=True)`, which TRL patches in, return the visual-word loss too.

    TRL's patch runs the backbone and keeps only the log-probabilities of the labels. The visual-word loss needs the
    same run of the backbone, and is computed inside the model's forward, where DDP and FSDP have its weights ready.
    TRL's head then reads only the hidden states that predict a label, and so skips image positions, which are most.
    Without Triton, as on a CPU, it would score every position.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)  # of the bound method, `self` would be counted twice
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if fused_lm_head and isinstance(self.lm_head, FSDPModule):
            # TRL reads the head's weight without calling the head, so FSDP would not sum its gradient over the ranks
            self.lm_head.unshard()
            # Pseudo image features read the embeddings' weight after their call, so FSDP must leave it whole
            self.get_input_embeddings().set_reshard_after_forward(not self.config.pseudo_image_features)
        if not fused_lm_head:
            return fused_forward(*args, labels=labels, **kwargs)
        backbone_outputs = []
        shifted = labels[:, 1:]
        is_label = shifted != -100

        def keep_labelled(module, inputs, outputs):
            backbone_outputs.append(outputs)
            hidden_states = outputs.last_hidden_state
            hidden_states = hidden_states[:, :-1][is_label.to(hidden_states.device)].unsqueeze(0)
            return type(outputs)(**{**outputs, "last_hidden_state": hidden_states})

        hook = self.model.register_forward_hook(keep_labelled)
        try:
            outputs = fused_forward(*args, fused_lm_head=True, shift_labels=shifted[is_label].unsqueeze(0), **kwargs)
        finally:
            hook.remove()
        if backbone_outputs[0].image_hidden_states is None or not self.config.visual_word_loss_weight:
            return outputs
        with maybe_gather_lm_head_ctx(self.lm_head.weight, self.model.vm_head.weight):
            input_ids = args[0] if args else kwargs.get("input_ids")
            image_mask = self.model.image_mask(input_ids, kwargs.get("inputs_embeds"), has_images=True)
            masks = image_mask, kwargs.get("attention_mask"), kwargs.get("position_ids")
            vw_loss_sum, vw_positions = self.visual_word_loss(backbone_outputs[0], *masks)
        return FusedVWLmmOutput(**outputs, vw_loss_sum=vw_loss_sum, vw_positions=vw_positions)

    model.forward = types.MethodType(forward, model)
