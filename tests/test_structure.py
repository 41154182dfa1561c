"""The house stays as it was drawn: which room imports which, how long a file is, what an import costs."""

import ast
import re
import subprocess
import sys

import pytest

from helpers import CODE, ROOT
from helpers.source import FILES, PACKAGE, imports_of, own_imports_of


# A room imports from itself, and from those after it
ROOMS = ["cli", "trainer", "evaluation", "hub", "conversion", "looking", "data", "root"]
# They travel to the Hub, where nothing else of the package is
TRAVELS = {f"modeling_vwlmm.{name.removesuffix('.py')}" for name in CODE}
LONGEST = 350

# Names under which a distribution is imported, where they differ from its own
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "easy-vqa": "easy_vqa", "lmms-eval": "lmms_eval"}
NOT_IMPORTED = {
    "sentencepiece": "transformers reads the tokenizer.model of published checkpoints with it",
    "protobuf": "transformers reads the tokenizer.model of published checkpoints with it",
}


def room_of(module):
    """`__main__` stands in the root, and belongs to the command line."""
    parts = module.split(".")[1:]
    if parts == ["__main__"]:
        return "cli"
    return parts[0] if parts and (PACKAGE / parts[0]).is_dir() else "root"


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in FILES.values()} - {PACKAGE.name}
    assert folders == set(ROOMS) - {"root"}


def test_rooms_import_one_way():
    wrong = [
        f"{module} imports {imported}"
        for module in FILES
        for imported in own_imports_of(module)
        if ROOMS.index(room_of(module)) > ROOMS.index(room_of(imported))
    ]
    assert not wrong, f"imports go {' -> '.join(ROOMS)}, but " + "; ".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    left = {module: own_imports_of(module) for module in FILES}
    assert sum(map(len, left.values())) > len(left)
    while free := [
        module
        for module, imported in left.items()
        if not imported & left.keys() or not any(module in others for others in left.values())
    ]:
        left = {module: imported for module, imported in left.items() if module not in free}
    # What is left imports from what is left, and is imported by it
    circles = {module: sorted(imported & left.keys()) for module, imported in left.items()}
    assert not circles


def test_what_travels_to_the_hub_imports_nothing_else_of_the_package():
    for module in TRAVELS:
        assert own_imports_of(module) <= TRAVELS, module


@pytest.mark.parametrize("folder", ["modeling_vwlmm", "tests"])
def test_no_file_is_too_long(folder):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    too_long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert not too_long, f"a file of more than {LONGEST} lines wants splitting into two that answer a question each"


def modules_after(statement, names):
    code = f"import sys; {statement}; print([name for name in {names} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(found.stdout)


def test_the_import_is_light():
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "matplotlib"]
    assert modules_after("import modeling_vwlmm", heavy) == []


def test_the_import_of_the_data_is_light():
    assert modules_after("import modeling_vwlmm.data", ["trl", "peft"]) == []


def declared(keyword):
    """Names in a list of requirements of setup.py, or in a dictionary of them those that users install."""
    (value,) = [
        node.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == keyword
    ]
    value = ast.literal_eval(value)
    if isinstance(value, dict):
        value = [name for extra, names in value.items() if extra not in ("test", "quality") for name in names]
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in value}


def test_what_is_imported_is_declared():
    """What not everybody needs, in an extra."""
    required, optional = declared("install_requires"), declared("extras_require")
    names = {distribution: IMPORTED_AS.get(distribution, distribution) for distribution in required | optional}
    imported = {source.partition(".")[0] for module in FILES for source, _ in imports_of(module)}
    imported -= sys.stdlib_module_names | {PACKAGE.name}
    assert imported - set(names.values()) == set(), "imported, and not declared in setup.py"
    unused = {distribution for distribution in required if names[distribution] not in imported}
    assert unused - NOT_IMPORTED.keys() == set(), "declared in setup.py, and imported nowhere"
    assert NOT_IMPORTED.keys() <= unused, "imported, and listed here as if it were not"
