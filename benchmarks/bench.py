"""What the visual-word loss costs: the loss alone, whole training steps, and generation; and what padding costs.

    python benchmarks/bench.py                          # a small model, on any machine
    python benchmarks/bench.py --only batches           # with and without padding, alone
    python benchmarks/bench.py --preset 1b 7b --lora    # random weights of those shapes, on a GPU

Every variant runs in a process of its own, where its peak memory is measured. On a CPU they take turns, a step each.
Times are medians.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version


os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))  # where processes find the variants

import torch  # noqa: E402
from batches import BATCHES, TRAINED, epoch, shares_of_padding  # noqa: E402
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
    """Medians of the seconds and the peak bytes of each spec, a dict by name. None for one that cannot run.

    On a GPU, whose memory cannot hold them all, one spec after another.
    """
    if len(specs) > 1 and "cuda" in {spec["device"] for spec in specs.values()}:
        return {name: take_turns(run, {name: spec}, rounds)[name] for name, spec in specs.items()}
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


def ratio(a, b):
    return None if a is None or b is None else a / b


def minus(a, b):
    return None if a is None or b is None else a - b


class Table:
    """Figures by name and shape, printed as Markdown."""

    def __init__(self):
        self.rows, self.shapes = {}, {}

    def put(self, name, shape, value, scale=1.0, digits=2):
        self.shapes[shape] = None
        self.rows.setdefault(name, {})[shape] = "-" if value is None else f"{value * scale:.{digits}f}"

    def show(self, title):
        rows = [[name, *(found.get(shape, "") for shape in self.shapes)] for name, found in self.rows.items()]
        rows.insert(0, [title, *self.shapes])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for i, row in enumerate(rows):
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            print("| " + " | ".join(cells) + " |")
            if i == 0:
                print("|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (w + 1) + ":|" for w in widths[1:]))
        print(flush=True)


def seconds_of(found):
    return {name: result and result[0] for name, result in found.items()}


def bytes_of(found):
    return {name: result and result[1] for name, result in found.items()}


def bench_loss(table, sizes, on, rounds):
    shape = f"V {sizes['vocab_size']}, {sizes['n'] // PATCHES} x {PATCHES}"
    for target, title in (("visual_words", "loss alone, joint"), ("language_model", "loss alone, VM head")):
        spec = {**sizes, "target": target, **on}
        found = take_turns(loss_alone, {name: {**spec, "loss": name} for name in LOSSES}, rounds)
        seconds, memory = seconds_of(found), bytes_of(found)
        for name in LOSSES:
            table.put(f"{title}: {name}, ms", shape, seconds[name], 1e3, 0)
        table.put(f"{title}: ours / naive", shape, ratio(seconds["ours"], seconds["naive"]))
        table.put(f"{title}: ours / bare", shape, ratio(seconds["ours"], seconds["bare"]))
        table.put(f"{title}: ours / liger", shape, ratio(seconds["ours"], seconds["liger"]))
        for name in ("ours", "naive", "liger"):
            table.put(f"{title}: {name} adds, MB", shape, memory[name], 1e-6, 0)
        table.put(f"{title}: ours / naive, memory", shape, ratio(memory["ours"], memory["naive"]), digits=3)
        table.put(f"{title}: ours / liger, memory", shape, ratio(memory["ours"], memory["liger"]), digits=3)


def bench_step(table, model, sizes, on, lora, rounds):
    batch_size = sizes["n"] // PATCHES
    shape = f"V {sizes['vocab_size']}, {batch_size} x {PATCHES}"
    spec = {**model, "vocab_size": sizes["vocab_size"], "batch_size": batch_size, **on, "lora": lora}
    found = take_turns(training_step, {name: {**spec, "step": name} for name in STEPS}, rounds)
    product = {**sizes, "loss": "bare", **on, "frozen_heads": lora}
    targets = ("visual_words", "language_model")
    products = take_turns(loss_alone, {target: {**product, "target": target} for target in targets}, rounds)
    joint, vm_head = (products[target] and products[target][0] for target in targets)
    seconds = seconds_of(found)
    for name in STEPS:
        table.put(f"step: {name}, ms", shape, seconds[name], 1e3, 0)
    table.put("step: bare products of b, ms", shape, joint, 1e3, 0)
    table.put("step: bare products of c, ms", shape, vm_head, 1e3, 0)
    trl, text, ours, head, naive, forward = (seconds[name] for name in STEPS)
    table.put("step: (b - a) / bare", shape, ratio(minus(ours, trl), joint))
    table.put("step: (b - text alone) / bare", shape, ratio(minus(ours, text), joint))
    table.put("step: b / a", shape, ratio(ours, trl))
    table.put("step: b / d", shape, ratio(ours, naive))
    table.put("step: c / a", shape, ratio(head, trl))
    table.put("step: c / (forward + bare)", shape, head and forward and vm_head and head / (forward + vm_head))
    optimizer = found["c: VM head"] and found["c: VM head"][2]
    table.put("step: c, of which the optimizer, ms", shape, optimizer, 1e3, 0)
    apart = minus(head, optimizer)
    table.put(
        "step: c without it / (forward + bare)", shape, apart and forward and vm_head and apart / (forward + vm_head)
    )
    memory = bytes_of(found)
    for name in STEPS[:-1]:
        table.put(f"step: {name}, peak GB", shape, memory[name], 1e-9)
    table.put("step: b / a, peak", shape, ratio(memory["b: joint"], memory["a: TRL"]), digits=3)


def bench_generation(table, model, vocab_size, on, rounds):
    spec = {**model, "vocab_size": vocab_size, "batch_size": 1, **on}
    found = seconds_of(take_turns(generation, {name: {**spec, "model": name} for name in GENERATIONS}, rounds))
    shape = f"V {vocab_size}, 1 x {PATCHES}"
    for name in GENERATIONS:
        table.put(f"generation: {name}, tokens a second", shape, ratio(NEW_TOKENS, found[name]), digits=1)
    table.put("generation: ours / LLaVA", shape, ratio(found["LLaVA"], found["ours"]), digits=3)


def bench_batches(table, model, vocab_size, on, stages=("instruct", "joint")):
    for stage in stages:
        spec = {**model, "vocab_size": vocab_size, **on, "stage": stage}
        found = take_turns(epoch, {name: {**spec, "batches": name} for name in BATCHES}, rounds=1)
        whole = found["padded"]
        for name, result in found.items():
            seconds, peak, tokens, padded = result or [None] * 4
            title = f"{stage}, {name}"
            table.put(title, "s a sample", ratio(seconds, TRAINED))
            table.put(title, "tokens a second", ratio(tokens, seconds), digits=0)
            table.put(title, "tokens / padded tokens", ratio(tokens, whole and whole[3]), digits=3)
            table.put(title, "time / padded time", ratio(seconds, whole and whole[0]), digits=3)
            table.put(title, "peak GB", peak, 1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lora", action="store_true", help="adapters on the LLM in the training steps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["loss", "steps", "generation", "batches"], nargs="+")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    on = {"device": device, "dtype": dtype}
    only = arguments.only or ["loss", "steps", "generation", "batches"]
    started = time.perf_counter()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    print(f"{where}, {dtype}, {packages}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for preset in arguments.preset:
            table, model = Table(), MODELS[preset]
            for vocab_size in arguments.vocab_size:
                for batch_size in arguments.batch_size:
                    n = batch_size * PATCHES
                    sizes = {"n": n, "d": model["llm"]["hidden_size"], "vocab_size": vocab_size}
                    if "loss" in only and n * vocab_size <= LIMITS[device]["loss"]:
                        bench_loss(table, sizes, on, arguments.rounds)
                    if "steps" in only and n * vocab_size <= LIMITS[device]["steps"]:
                        bench_step(table, model, sizes, on, arguments.lora, arguments.rounds)
                if "generation" in only:
                    bench_generation(table, model, vocab_size, on, 5 * arguments.rounds)
            title = f"{preset}, d {model['llm']['hidden_size']}{', LoRA' if arguments.lora else ''}"
            if table.rows:
                table.show(title)
            if "batches" in only:
                table = Table()
                bench_batches(table, model, min(arguments.vocab_size), on)
                table.show(f"batches: {title}")
        if "batches" in only:
            table = Table()
            for name, share in shares_of_padding().items():
                table.put(name, "share of padding, %", share, 100)
            table.show("100,000 samples")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
