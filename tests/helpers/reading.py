"""A processor and samples whose words are tokens."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.conversations import PLAIN_TEMPLATE, picture, tiny_processor
from modeling_vwlmm.data.reading import BACKGROUND


WORDS = ["owl", "bird", "animal", "cow", *BACKGROUND]


def reading_processor(config, words=WORDS):
    """A processor of which some words are tokens: w30 and the ones after it are these."""
    processor = tiny_processor(config)
    vocabulary = dict(processor.tokenizer.get_vocab())
    for i, word in enumerate(words):
        vocabulary[word] = vocabulary.pop(f"w{30 + i}")
    vocabulary = {word: i for word, i in vocabulary.items() if word != "<image>"}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="w3",
        additional_special_tokens=["<image>"],
        chat_template=PLAIN_TEMPLATE,
    )
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    return processor


def said(answer, question="w20"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sample(answer, images=1):
    return {"images": [picture(i) for i in range(images)], "messages": said(answer)}
