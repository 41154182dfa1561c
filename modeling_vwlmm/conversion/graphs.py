"""A VW-LMM model as graphs of ONNX or OpenVINO, by the exporters of transformers."""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.exporters import AutoHfExporter, ExportedModel, OnnxConfig, OpenVINOConfig

from ..files import new_folder, reading, remove_code
from ..modeling_vwlmm import VWLmmForCausalLM
from ..weights import check_shards
from .checkpoint import open_checkpoint, read_processor


# With the cache as input and output in both: a cache inside the graph would keep transformers from running it
CONFIGS = {"onnx": OnnxConfig(dynamic=True), "openvino": OpenVINOConfig(dynamic=True, stateful=False)}


class ImageEncoder(nn.Module):
    """Pixels, (images, 3, height, width), to what the LLM reads and the features f, (images, patches, d) each."""

    def __init__(self, model: VWLmmForCausalLM) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.model.get_image_features(pixel_values)
        return {"read_by_the_llm": outputs.pooler_output, "image_features": outputs.image_hidden_states}


class VisualWords(nn.Module):
    """Features f, (images, patches, d), to visual words, (images, patches, V)."""

    def __init__(self, model: VWLmmForCausalLM) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, image_features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"visual_words": self.model.visual_words(image_features)}


class Embeddings(nn.Module):
    """Token ids, (batch, length), to embeddings, (batch, length, d)."""

    def __init__(self, model: VWLmmForCausalLM) -> None:
        super().__init__()
        self.embeddings = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.embeddings(input_ids)}


def export_graphs(
    source: str | os.PathLike, destination: str | os.PathLike, export_format: str, dtype: torch.dtype | None = None
) -> None:
    """Write a model as four graphs, which transformers' `ExportedModel.from_pretrained` or the runtime itself runs.

    `image_encoder` makes of pixels what the LLM reads (pseudo image features if the model has them) and the features
    f, `visual_words` of f the visual words, `embed_tokens` embeddings of ids, and `language_model` logits of
    embeddings, with a cache that may be empty. A caller puts `read_by_the_llm` where the image tokens are.

    Args:
        source, destination, dtype: as for [`convert`].
        export_format: `"onnx"` or `"openvino"`.

    Raises:
        ValueError: the model is no VW-LMM model.
        ImportError: the packages of the format are missing, which it names.
    """
    try:
        exporter = AutoHfExporter.from_config(CONFIGS[export_format])
    except ImportError as error:  # which asks for the one version that transformers was tested with
        extra = f"modeling-vwlmm[{export_format}]"
        raise ImportError(f'{export_format} needs more: pip install "{extra}" ({error})') from error
    folder, _ = open_checkpoint(source)
    check_shards(folder)
    processor = read_processor(folder)
    with reading(folder):
        model = VWLmmForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    with new_folder(destination) as unfinished, torch.no_grad():
        components = {
            name: exporter.export(part, inputs, CONFIGS[export_format]).components["model"]
            for name, (part, inputs) in _parts(model).items()
        }
        exported = ExportedModel(
            components, export_format, config=model.config, generation_config=model.generation_config
        )
        exported.save_pretrained(unfinished)
        if processor is not None:
            processor.save_pretrained(unfinished)
        remove_code(unfinished)


def _parts(model: VWLmmForCausalLM) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every part with inputs to trace it with, of sizes above 1, which would be taken for constant."""
    config = model.config
    channels = config.vision_config.num_channels
    features = torch.randn(2, config.image_seq_length, config.text_config.hidden_size, dtype=model.dtype)
    llm = _language_model(model)
    past = DynamicCache(config=llm.config)
    embeddings = torch.randn(2, 7, features.shape[-1], dtype=model.dtype)
    llm(inputs_embeds=embeddings[:, :4], past_key_values=past)
    return {
        "image_encoder": (
            ImageEncoder(model),
            {"pixel_values": torch.randn(2, channels, *config.image_size, dtype=model.dtype)},
        ),
        "visual_words": (VisualWords(model), {"image_features": features}),
        "embed_tokens": (Embeddings(model), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}),
        "language_model": (
            llm,
            {
                "inputs_embeds": embeddings[:, 4:],
                "attention_mask": torch.ones(2, 7, dtype=torch.long),
                "past_key_values": past,
            },
        ),
    }


def _language_model(model: VWLmmForCausalLM) -> PreTrainedModel:
    """The LLM with its head, as transformers has it, which shares the weights."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(llm, llm.base_model_prefix, model.model.language_model)
    llm.set_output_embeddings(model.lm_head)
    return llm.eval()
