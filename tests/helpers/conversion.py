"""Models that `vwlmm convert` reads or makes."""

from transformers import AutoModelForCausalLM, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from helpers.conversations import tiny_processor
from helpers.tiny import IMAGE_WITHIN, TOWERS, llm_config, randomize, tiny_config, tower_config
from modeling_vwlmm.cli import main


def convert(*arguments):
    main(["convert", *map(str, arguments)])
    folder = arguments[-1]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def write_llava(folder, llm="llama", tower="clip", image_token_id=IMAGE_WITHIN):
    config = LlavaConfig(
        vision_config=tower_config(tower),
        text_config=llm_config(llm),
        image_token_index=image_token_id,
        **TOWERS[tower][1],
    )
    llava = randomize(LlavaForConditionalGeneration(config))
    llava.save_pretrained(folder)
    tiny_processor(tiny_config(llm, tower, image_token_index=image_token_id)).save_pretrained(folder)
    return llava
