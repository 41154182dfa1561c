"""What several tests share. A script beside this folder, and pytest, find it as `helpers`."""

from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
# What travels to the Hub with a model
CODE = {
    f"{name}.py"
    for name in (
        "compatibility",
        "configuration_vwlmm",
        "image_token",
        "modeling_vwlmm",
        "strict_loading",
        "visual_word_loss",
        "wrapped_weights",
    )
}
