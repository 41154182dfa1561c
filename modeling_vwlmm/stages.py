"""Which parts of a model the stages of VW-LMM train, with which loss."""

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


def train_only(model, parts):
    """Freeze all of a [`VWLmmForCausalLM`] but the named parts, keys of `PARTS`."""
    model.requires_grad_(False)
    for part in parts:
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(True)
