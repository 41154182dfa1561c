"""Training: TRL's supervised fine-tuning with the visual-word loss."""

from .sft_config import VWLmmSFTConfig
from .sft_trainer import VWLmmSFTTrainer


__all__ = ["VWLmmSFTConfig", "VWLmmSFTTrainer"]
