"""VW-LMM, multi-modal auto-regressive modeling via visual words (arXiv 2403.07720), for the Hugging Face libraries."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaProcessor,
)

from .configuration_vwlmm import VWLmmConfig
from .modeling_vwlmm import VWLmmForCausalLM, VWLmmModel, VWLmmPreTrainedModel


__version__ = "0.1.0"

AutoConfig.register("vwlmm", VWLmmConfig)
AutoModel.register(VWLmmConfig, VWLmmModel)
AutoModelForCausalLM.register(VWLmmConfig, VWLmmForCausalLM)
AutoModelForImageTextToText.register(VWLmmConfig, VWLmmForCausalLM)
AutoProcessor.register(VWLmmConfig, LlavaProcessor)


class _LlavaCheckpoint:
    """For `AutoModelForCausalLM`, which has no LLaVA: names the command that makes a VW-LMM model of it."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path, *args, **kwargs):
        VWLmmConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)


# Configs of transformers need exist_ok
AutoModelForCausalLM.register(LlavaConfig, _LlavaCheckpoint, exist_ok=True)

__all__ = ["VWLmmConfig", "VWLmmForCausalLM", "VWLmmModel", "VWLmmPreTrainedModel"]
