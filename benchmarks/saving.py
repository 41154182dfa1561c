"""What the hashes of a checkpoint cost a run: how long a save is held up for them, on a checkpoint of a GB.

python benchmarks/saving.py [--steps 3] [--vocab-size 40000]        needs 4 GB of memory, 5 GB of disk
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")

from helpers.conversations import conversations, tiny_processor  # noqa: E402
from helpers.tiny import llm_config, tiny_config  # noqa: E402
from helpers.training import sft_config  # noqa: E402
from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM  # noqa: E402
from modeling_vwlmm.trainer import VWLmmSFTTrainer, checkpoints  # noqa: E402


def timed(seconds, name, function):
    def run(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.setdefault(name, []).append(time.perf_counter() - started)

    return run


class TimedThread(threading.Thread):
    def join(self, timeout=None):
        timed(SECONDS, "waiting for the hashes before", super().join)(timeout)


SECONDS = {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="each ends with a save")
    parser.add_argument("--vocab-size", type=int, default=40_000)
    arguments = parser.parse_args()
    tiny = tiny_config()
    llm = llm_config(vocab_size=arguments.vocab_size, hidden_size=1024, tie_word_embeddings=False)
    config = VWLmmConfig(
        vision_config=tiny.vision_config,
        text_config=llm,
        image_token_index=arguments.vocab_size,
        visual_vocab_size=99,
        vision_feature_layer=-2,
    )
    with tempfile.TemporaryDirectory() as folder:
        args = sft_config(folder, stage="joint", max_steps=arguments.steps, save_strategy="steps", save_steps=1)
        trainer = VWLmmSFTTrainer(
            VWLmmForCausalLM(config), args, train_dataset=conversations(), processing_class=tiny_processor(config)
        )
        checkpoints.write_contents = timed(SECONDS, "sizes and data", checkpoints.write_contents)
        checkpoints.add_hashes = timed(SECONDS, "hashes, beside the next step", checkpoints.add_hashes)
        checkpoints.threading.Thread = TimedThread
        trainer._save_checkpoint = timed(SECONDS, "a save", trainer._save_checkpoint)
        trainer.train()
        size = sum(path.stat().st_size for path in Path(folder, f"checkpoint-{arguments.steps}").rglob("*"))
    print(f"checkpoints of {size / 1e9:.2f} GB, {arguments.steps} saves; seconds each")
    for name, found in SECONDS.items():
        print(f"{name:32}" + "".join(f"{value:10.4f}" for value in found))
    held_up = sum(SECONDS["sizes and data"])
    print(f"sizes and data hold a save up for {100 * held_up / sum(SECONDS['a save']):.2f} % of its time")


if __name__ == "__main__":
    main()
