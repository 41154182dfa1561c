"""The package's source code as `ast` reads it, without running it."""

import ast
from pathlib import Path

from helpers import ROOT


PACKAGE = ROOT / "modeling_vwlmm"


def module_of(path: Path) -> str:
    """The dotted name of a file of the package; a folder is its `__init__.py`."""
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports_of(module: str) -> list[tuple[str, str | None]]:
    """Every import in a module, at its top or in a function: (absolute module, name taken from it or None)."""
    found = []
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                source = ".".join([*package, *source.split(".")]).rstrip(".")
            found += [(source, alias.name) for alias in node.names]
    return found


def own_imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for source, name in imports_of(module):
        whole = f"{source}.{name}"
        found |= {whole if whole in FILES else source} & FILES.keys()
    return found
