"""Training: TRL's supervised fine-tuning with the visual-word loss."""

from ..requirements import named


try:
    from .sft_config import VWLmmSFTConfig
    from .sft_trainer import VWLmmSFTTrainer
except ImportError as error:
    raise named(error) from None


__all__ = ["VWLmmSFTConfig", "VWLmmSFTTrainer"]
