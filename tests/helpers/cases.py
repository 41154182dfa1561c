"""What tests of the model run over."""

import pytest

from helpers.tiny import IMAGE_BEYOND, IMAGE_WITHIN


IMAGE_TOKENS = pytest.mark.parametrize("image_token_index", [IMAGE_BEYOND, IMAGE_WITHIN], ids=["beyond", "within"])
PADDING = pytest.mark.parametrize("padding", ["right", "left"])
PSEUDO = pytest.mark.parametrize("pseudo", [False, True], ids=["features", "pseudo"])


class Calls:
    """Counts the calls of a module, with the length of the sequence in each."""

    def __init__(self, module):
        self.lengths = []
        module.register_forward_hook(lambda module, args, output: self.lengths.append(output.shape[-2]))


def saved(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    return folder
