"""Processors for VW-LMM models: LLaVA's own, set up from the model's config."""

import math

from transformers import LlavaImageProcessorPil, LlavaProcessor


IMAGE_TOKEN = "<image>"


def make_processor(config, tokenizer, image_mean, image_std, chat_template=None, resample=None):
    """The processor of a model: as many placeholders an image as the config's vision tower makes patches of it.

    It is a stock [`~transformers.LlavaProcessor`], so that `AutoProcessor` loads it with or without this package.

    Args:
        config ([`VWLmmConfig`]): of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            The LLM's. An image token is added to it if it has none.
        image_mean, image_std (`list[float]`): a channel each, what the vision tower was trained with, for pixel
            values in 0 to 1. The mean is also the colour that pads an image to a square.
        chat_template (`str`, *optional*): the tokenizer's own if not given.
        resample (`int`, *optional*): PIL's filter, bicubic if not given.

    Raises:
        ValueError: if the image token is not the config's `image_token_id`.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id != config.image_token_id:
        raise ValueError(
            f"the tokenizer's {IMAGE_TOKEN} is token {image_token_id}, but the config's image_token_id is "
            f"{config.image_token_id}"
        )
    height, width = config.image_size
    # LLaVA's processor counts (height // patch_size) * (width // patch_size) + additional tokens, less a CLS token
    patch_size = round(math.sqrt(height * width / config.image_seq_length))
    has_cls = config.vision_feature_select_strategy == "default"
    additional = config.image_seq_length - (height // patch_size) * (width // patch_size) + has_cls
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=config.image_aspect_ratio == "pad",
            size={"shortest_edge": min(height, width)},
            crop_size={"height": height, "width": width},
            image_mean=image_mean,
            image_std=image_std,
            **({} if resample is None else {"resample": resample}),
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        num_additional_image_tokens=additional,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        chat_template=chat_template or tokenizer.chat_template,
    )
