"""How often a patch is named by the VM head, the logit lens of every layer, and the nearest input embedding.

python benchmarks/lenses.py MODEL --dataset held_out.json --image_folder images [--masks masks]

Names of an image are its column `names`, or the words of its answers. The control asks the same of the names of the
other images: what a lens scores there, it scores by words that are everywhere.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor

from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.data import load_conversations, open_images
from modeling_vwlmm.evaluation.intervals import interval
from modeling_vwlmm.evaluation.limits import name_matrix, naming
from modeling_vwlmm.evaluation.limits_report import names_of
from modeling_vwlmm.evaluation.questions import questions_of
from modeling_vwlmm.looking.lenses import lens_words
from modeling_vwlmm.processing import patch_grid
from modeling_vwlmm.words import seen_image


def covered_patches(processor, path, patches):
    """The patches that the white of a mask covers by half; the fullest ones if none is."""
    rows, columns = patch_grid(processor, patches)
    mask = seen_image(processor, Image.open(path).convert("RGB")).convert("L")
    share = np.asarray(mask.resize((columns, rows), Image.Resampling.BOX)).reshape(-1)
    return np.flatnonzero(share >= min(128, share.max()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder")
    parser.add_argument("--dataset", required=True, help="LLaVA's JSON")
    parser.add_argument("--image_folder", required=True)
    parser.add_argument("--masks", help="a folder with a mask of the object for every image: only its patches count")
    arguments = parser.parse_args()
    model = VWLmmForCausalLM.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    questions = questions_of(load_conversations(arguments.dataset, arguments.image_folder))
    names = names_of(questions)
    firsts = {question.image_key: question for question in reversed(questions) if question.images}
    vocabulary = [processor.tokenizer.decode([i]) for i in range(model.config.visual_vocab_size)]
    is_name = name_matrix(vocabulary, [names[key] for key in firsts])

    tops, covered = {}, []
    for question in tqdm(firsts.values()):
        (image,) = open_images(question.row())
        for lens, top in lens_words(model, processor, image).items():
            tops.setdefault(lens, []).append(top)
        every = np.arange(len(top))
        path = Path(question.images[0]["path"])
        covered.append(
            covered_patches(processor, Path(arguments.masks) / path.name, len(top)) if arguments.masks else every
        )

    patches = sum(map(len, covered))
    print(f"{len(firsts)} images, {patches} patches; 95 % intervals over images, the control in parentheses")
    print("| patches that are named, % | by the first word | by one of three |\n|---|---|---|")
    for lens, top in tops.items():
        cells = []
        for k in (1, 3):
            own, others = naming(np.stack(top)[..., :k], is_name)
            own, others = (
                interval(np.array([100 * values[where].mean() for values, where in zip(of, covered, strict=True)]))
                for of in (own, others)
            )
            cells.append(f"{own.mean:.1f} [{own.low:.1f}, {own.high:.1f}] ({others.mean:.1f})")
        print(f"| {lens} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
