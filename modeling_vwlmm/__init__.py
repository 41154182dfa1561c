"""VW-LMM, multi-modal auto-regressive modeling via visual words (arXiv 2403.07720), for the Hugging Face libraries."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaProcessor,
)

from .configuration_vwlmm import VWLmmConfig
from .modeling_vwlmm import VWLmmForCausalLM, VWLmmModel, VWLmmPreTrainedModel


__version__ = "0.1.0"

AutoConfig.register("vwlmm", VWLmmConfig)
AutoModel.register(VWLmmConfig, VWLmmModel)
AutoModelForCausalLM.register(VWLmmConfig, VWLmmForCausalLM)
AutoModelForImageTextToText.register(VWLmmConfig, VWLmmForCausalLM)
AutoModelForMultimodalLM.register(VWLmmConfig, VWLmmForCausalLM)
AutoProcessor.register(VWLmmConfig, LlavaProcessor)


__all__ = ["VWLmmConfig", "VWLmmForCausalLM", "VWLmmModel", "VWLmmPreTrainedModel"]
