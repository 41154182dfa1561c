"""The visual-word loss in TRL's fused LM head, from one run of the backbone."""

import functools
import types
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx


@dataclass
class FusedVWLmmOutput(FusedCausalLMOutput):
    """What TRL's fused LM head returns, the sum of the visual-word loss and the number of positions it scores."""

    vw_loss_sum: torch.Tensor | None = None
    vw_positions: torch.Tensor | None = None


def add_visual_word_loss(model):
    """Let `model(..., fused_lm_head=True)`, patched in by TRL, return the visual-word loss too.

    TRL's patch runs the backbone and keeps nothing of it but the log-probabilities of the labels. The loss is taken
    from the same run of the backbone, inside the model's forward, where DDP and FSDP have its weights ready. TRL's
    head gets the hidden states of the labels alone, of which image positions, the most by far, have none: without
    Triton it would score every position, which takes half of a step on a CPU.
    """
    fused_forward = model.forward

    @functools.wraps(fused_forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if fused_lm_head and isinstance(self.lm_head, FSDPModule):
            # TRL reads its weight without calling it, and would leave the other ranks out of its gradient
            self.lm_head.unshard()
            # Pseudo image features are made of its weight after it was called
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
            vw_loss_sum, vw_positions = self.visual_word_loss(backbone_outputs[0], kwargs.get("attention_mask"))
        return FusedVWLmmOutput(**outputs, vw_loss_sum=vw_loss_sum, vw_positions=vw_positions)

    model.forward = types.MethodType(forward, model)
