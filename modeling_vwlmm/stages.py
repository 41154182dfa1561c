"""Which parts of a model the stages of VW-LMM train, with which loss."""

import torch


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


def trained_parts(model: torch.nn.Module) -> list[str]:
    """The parts of a [`VWLmmForCausalLM`], keys of `PARTS`, of which something trains: weights or an adapter."""
    return [
        part
        for part, names in PARTS.items()
        if any(parameter.requires_grad for name in names for parameter in model.get_submodule(name).parameters())
    ]


def train_only(model: torch.nn.Module, parts: list[str]) -> None:
    """Freeze all of a [`VWLmmForCausalLM`] but the named parts, keys of `PARTS`."""
    model.requires_grad_(False)
    for part in parts:
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(True)
