"""The suites of transformers and PEFT on VW-LMM and, as the control, on LLaVA: `make peers`.

The tests are those of the source distributions of the installed releases, which come from the package index into
`~/.cache/vwlmm/peers`. The one of transformers lacks files that its tests import: without `--tests`, the `tests` of a
checkout of transformers, what those hold does not run, which is generation and export.

The table has each test that VW-LMM fails and LLaVA does not, with an image token that is a row of the embeddings and
with one beyond them. Those with a reason in `ARGUED` are right to fail; any other makes the exit status 1.
"""

import argparse
import collections
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vwlmm" / "peers"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
MODELS = ["Llava", "Ours", "OursBeyond"]
SUITES = ["transformers", "peft"]
# What stands where the source distribution of transformers has nothing, so that the rest can be imported
STAND_INS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n\n\nclass ExportGenerateTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "utils/test_configuration_utils.py": 'config_common_kwargs = {"return_dict": False, "dtype": "float16"}\n',
}
# What PEFT's tests import and these do not use
DIFFUSERS = "class StableDiffusionPipeline: ...\n"
# Model and test, with wildcards: why it is right to fail
ARGUED = {
    "OursBeyond test_eager_matches_sdpa_inference_*": "gives placeholders and no image: they have no row to read",
    "OursBeyond test_resize_*": "makes the ids fit a smaller vocabulary, after which no placeholder is left",
    "Ours* test_can_init_all_missing_weights": "transformers starts CLIP another way below code that is not its own; "
    "weights of the tower that are missing are refused",
    "Ours* test_reverse_loading_mapping": "is skipped, as no weight of ours was ever renamed",
    "Ours* test_lora_conversion[[]*": "PEFT's conversion forgets exclude_modules, so that weights are missing",
}


def source_tests(name, scratch):
    """The `tests` of a source distribution, as a package in a folder of its own."""
    release = f"{name}-{importlib.metadata.version(name)}"
    if not (CACHE / release).is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        # A source distribution is asked for its metadata, which takes setuptools, here already
        download = ["download", "--no-deps", "--no-binary", name, "--no-build-isolation"]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # a folder that is there is whole
            subprocess.run([*PIP, *download, "--dest", folder, release.replace("-", "==")], check=True)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, [m for m in archive if f"{release}/tests/" in m.name], filter="data")
            shutil.copytree(Path(folder) / release, CACHE / release)
    return shutil.copytree(CACHE / release / "tests", Path(scratch) / name / "tests")


def complete(tests, checkout):
    """Add what transformers' source distribution lacks."""
    for name, stand_in in STAND_INS.items():
        file, source = tests / name, checkout and checkout / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            from_checkout = source and source.exists() and not name.startswith("utils/")  # which imports more
            file.write_text(source.read_text() if from_checkout else stand_in)


def installed(name):
    """A package that only these tests need, in a folder of its own."""
    folder = CACHE / name
    if not folder.is_dir():
        subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder), name], check=True)
    return folder


def run(suite, model, tests, chosen):
    """Each test's name and what became of it: "ok", "skipped", or its error."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        paths = [tests.parent, installed("parameterized"), HERE, ROOT / "tests"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
        own = f"({model} and not {model}Beyond)" if model == "Ours" else model
        options = ["-c", os.devnull, "--rootdir", scratch, "-p", "no:cacheprovider", "--junitxml", str(report)]
        command = [sys.executable, "-m", "pytest", "-q", *options, "-k", f"{own} and ({chosen})" if chosen else own]
        output = subprocess.run(
            [*command, str(HERE / f"{suite}_suite.py")], cwd=scratch, env=environment, capture_output=True, text=True
        )
        if output.returncode not in (0, 1):  # all passed, or some failed
            sys.exit(f"{suite}'s tests did not run:\n{output.stdout[-3000:]}{output.stderr[-3000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    return {re.sub(rf"/\S*/{model}\b", "model", case.get("name")): outcome(case) for case in cases}


def outcome(case):
    problems = [problem for problem in case if problem.tag in ("failure", "error")]
    if problems:
        return " ".join(problems[0].get("message", "").split()) or "failed"
    return "skipped" if case.find("skipped") is not None else "ok"


def reason_of(model, test):
    return next((ARGUED[entry] for entry in ARGUED if fnmatch.fnmatchcase(f"{model} {test}", entry)), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--tests", type=Path, help="tests of a checkout of transformers, of the release installed")
    parser.add_argument("-k", help="run tests that match this expression of pytest")
    arguments = parser.parse_args()
    unargued = 0
    for suite in arguments.suites:
        with tempfile.TemporaryDirectory() as scratch:
            tests = source_tests(suite, scratch)
            if suite == "transformers":
                complete(tests, arguments.tests)
            (tests.parent / "diffusers.py").write_text(DIFFUSERS)
            for folder in (tests, *(path for path in tests.iterdir() if path.is_dir())):
                (folder / "__init__.py").touch()
            found = {model: run(suite, model, tests, arguments.k) for model in MODELS}
        print(f"\n{suite} {importlib.metadata.version(suite)}\n\n| model | ok | skipped | failed |\n|---|---|---|---|")
        for model, outcomes in found.items():
            counts = collections.Counter(o if o in ("ok", "skipped") else "failed" for o in outcomes.values())
            print(f"| {model} | {counts['ok']} | {counts['skipped']} | {counts['failed']} |")
        print("\n| fails for us alone | test | error | reason |\n|---|---|---|---|")
        for model in MODELS[1:]:
            for test, error in found[model].items():
                if error == "ok" or found["Llava"].get(test) not in ("ok", None):
                    continue
                reason = reason_of(model, test)
                unargued += reason is None
                print(f"| {model} | {test} | {error[:120].replace('|', '/')} | {reason or '**none**'} |", flush=True)
    sys.exit(unargued > 0)


if __name__ == "__main__":
    main()
