"""What the visual-word loss costs: the loss alone, whole training steps, and generation.

    python benchmarks/bench.py                          # a small model, on any machine
    python benchmarks/bench.py --preset 1b 7b --lora    # random weights of those shapes, on a GPU

Every variant runs in a process of its own, where its peak memory is measured; they take turns, a step each, and the
medians of their times are compared.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time


os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))  # where processes find the variants

import torch  # noqa: E402
from variants import GENERATIONS, LOSSES, NEW_TOKENS, STEPS, generation, loss_alone, training_step  # noqa: E402


PATCHES = 576
MODELS = {
    # SmolLM2-135M's width
    "small": {
        "llm": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
                    num_key_value_heads=3),
        "tower": dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2),
    },
    "1b": {
        "llm": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                    num_key_value_heads=8),
        "tower": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    },
    "7b": {
        "llm": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                    num_key_value_heads=32),
        "tower": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    },
}  # fmt: skip
# Logits of a batch's image positions, which the naive formula builds several times: larger shapes are left out
LIMITS = {"cpu": {"loss": 2e8, "steps": 1e8}, "cuda": {"loss": 1e9, "steps": 1e9}}


def take_turns(run, specs, rounds):
    """Medians of the seconds and the peak bytes of each spec, a dict by name. None for one that cannot run."""
    # Every process is forked off a server that has imported all, and done nothing else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["variants"])
    processes = {}
    for name, spec in specs.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(theirs, spec), daemon=True)
        process.start()
        theirs.close()
        try:
            ours.recv()  # ready
            processes[name] = ours, process
        except EOFError:
            processes[name] = None
    results = {name: [] for name, started in processes.items() if started}
    for _ in range(rounds):
        for name, found in results.items():
            processes[name][0].send("go")
            found.append(processes[name][0].recv())
    for name in results:
        processes[name][0].send("stop")
        processes[name][1].join()
    medians = {name: tuple(map(statistics.median, zip(*found, strict=True))) for name, found in results.items()}
    return {name: medians.get(name) for name in specs}


def cell(value, scale=1.0, digits=2):
    return "-" if value is None else f"{value * scale:.{digits}f}"


def ratio(a, b):
    return None if a is None or b is None else a / b


def table(title, header, rows):
    rows = [header, *rows]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(header))]
    print(f"\n**{title}**\n")
    for i, row in enumerate(rows):
        cells = [
            str(c).ljust(w) if k == 0 else str(c).rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 1) + (" " if k == 0 else ":") for k, w in enumerate(widths)) + "|")
    print(flush=True)


def bench_loss(d, device, vocab_sizes, batch_sizes, rounds):
    rows = []
    for target in ("visual_words", "language_model"):
        for vocab_size in vocab_sizes:
            for batch_size in batch_sizes:
                n = batch_size * PATCHES
                if n * vocab_size > LIMITS[device]["loss"]:
                    continue
                specs = {
                    name: {"loss": name, "target": target, "n": n, "d": d, "vocab_size": vocab_size, "device": device}
                    for name in LOSSES
                }
                found = take_turns(loss_alone, specs, rounds)
                seconds = {name: found[name] and found[name][0] for name in found}
                memory = {name: found[name] and found[name][1] for name in found}
                kind = "joint" if target == "visual_words" else "VM head"
                rows.append(
                    [
                        f"{kind}, V {vocab_size}, {batch_size} x {PATCHES}",
                        *(cell(seconds.get(name), 1e3, 0) for name in LOSSES),
                        cell(ratio(seconds["ours"], seconds.get("naive"))),
                        cell(ratio(seconds["ours"], seconds["bare"])),
                        *(cell(memory.get(name), 1e-6, 0) for name in LOSSES if name != "bare"),
                        cell(ratio(memory["ours"], memory.get("naive")), digits=3),
                    ]
                )
    header = [
        "the loss alone",
        *(f"{name}, ms" for name in LOSSES),
        "ours / naive",
        "ours / bare",
        *(f"{name}, MB" for name in LOSSES if name != "bare"),
        "ours / naive, memory",
    ]
    table(f"Forward and backward of the loss alone, d {d}; MB added, parameters' gradients apart", header, rows)


def bench_steps(preset, device, vocab_sizes, batch_sizes, lora, rounds):
    rows = []
    for vocab_size in vocab_sizes:
        for batch_size in batch_sizes:
            n, d = batch_size * PATCHES, MODELS[preset]["llm"]["hidden_size"]
            spec = {
                **MODELS[preset],
                "vocab_size": vocab_size,
                "batch_size": batch_size,
                "device": device,
                "lora": lora,
            }
            if n * vocab_size > LIMITS[device]["steps"]:
                continue
            found = take_turns(training_step, {name: {**spec, "step": name} for name in STEPS}, rounds)
            product = {
                "loss": "bare",
                "n": n,
                "d": d,
                "vocab_size": vocab_size,
                "device": device,
                "frozen_heads": lora,
            }
            products = take_turns(
                loss_alone,
                {target: {**product, "target": target} for target in ("visual_words", "language_model")},
                rounds,
            )
            seconds = {name: found[name] and found[name][0] for name in found}
            joint, vm_head = (products[target][0] for target in ("visual_words", "language_model"))
            trl, ours = seconds["a: TRL"], seconds["b: joint"]
            head, forward = seconds["c: VM head"], seconds["forward"]
            rows.append(
                [
                    f"V {vocab_size}, batch {batch_size}",
                    *(cell(seconds.get(name), 1e3, 0) for name in STEPS),
                    f"{cell(joint, 1e3, 0)}, {cell(vm_head, 1e3, 0)}",
                    cell((ours - trl) / joint),
                    cell(ours / trl),
                    cell(head / trl),
                    cell(head / (forward + vm_head)),
                    *(cell(found[name][1] if found.get(name) else None, 1e-9) for name in STEPS if name != "forward"),
                ]
            )
    header = [
        "training step",
        *(f"{name}, ms" for name in STEPS),
        "bare products, ms",
        "(b - a) / bare",
        "b / a",
        "c / a",
        "c / (forward + bare)",
        *(f"{name}, GB" for name in STEPS if name != "forward"),
    ]
    table(f"Whole training steps of TRL's trainer and ours, {preset}{', LoRA' if lora else ''}", header, rows)


def bench_generation(preset, device, rounds):
    spec = {**MODELS[preset], "vocab_size": 32_000, "batch_size": 1, "device": device}
    found = take_turns(generation, {name: {**spec, "model": name} for name in GENERATIONS}, rounds)
    llava, ours = (NEW_TOKENS / found[name][0] for name in GENERATIONS)
    row = ["tokens a second", cell(llava, digits=1), cell(ours, digits=1), cell(ours / llava, digits=3)]
    table(f"Generation, {preset}", ["", "LLaVA", "ours", "ours / LLaVA"], [row])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lora", action="store_true", help="adapters on the LLM in the training steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["loss", "steps", "generation"], nargs="+")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    only = arguments.only or ["loss", "steps", "generation"]
    started = time.perf_counter()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    import transformers
    import trl

    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, "
          f"{'bfloat16' if device == 'cuda' else 'float32'}")  # fmt: skip
    sizes = arguments.vocab_size, arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for preset in arguments.preset:
            if "loss" in only:
                bench_loss(MODELS[preset]["llm"]["hidden_size"], device, *sizes, arguments.rounds)
            if "steps" in only:
                bench_steps(preset, device, *sizes, arguments.lora, arguments.rounds)
            if "generation" in only:
                bench_generation(preset, device, 3 * arguments.rounds)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
