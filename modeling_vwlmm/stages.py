"""The stages of VW-LMM: which parts of a model each one trains, with which loss."""

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
    # Before the paper's four: the LLM reads words where images will stand, see `ReadingCollator`
    "read": {"trainable": ["language_model"], "visual_word_loss_weight": 0.0},
}


# A stage makes sense only after the one that is named here
COMES_AFTER = {"instruct": "align", "visual_words": "instruct", "joint": "visual_words"}


def stages_of(records: list[dict]) -> list[str]:
    """The names of the stages that made a model, from its records, see [`read_training_run`]."""
    return [str(name) for record in records for name in [record.get("stage"), *record.get("stages_before", [])]]


def missing_stage(stage: str | None, records: list[dict]) -> str | None:
    """The stage that should have come before `stage`; None if it did, or if the model has no record."""
    before = COMES_AFTER.get(stage or "")
    return before if records and before not in stages_of(records) else None


def trained_parts(model: torch.nn.Module) -> list[str]:
    """The parts of a [`VWLmmForCausalLM`], keys of `PARTS`, that train, be it only some weights or an adapter."""
    return [
        part
        for part, names in PARTS.items()
        if any(parameter.requires_grad for name in names for parameter in model.get_submodule(name).parameters())
    ]


def train_only(model: torch.nn.Module, parts: list[str]) -> None:
    """Freeze a [`VWLmmForCausalLM`] except for the named parts, keys of `PARTS`."""
    model.requires_grad_(False)
    for part in parts:
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(True)
