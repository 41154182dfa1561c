"""Says which of the installed libraries are not those that this package works with."""

from importlib import metadata

from packaging.requirements import Requirement


def named(error: ImportError) -> ImportError:
    """The error of an import from a library, whose name is gone, with the releases that have it: one line.

    It names every library that is not of a release that setup.py asks for. If all are, it is the error as it was.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires("modeling-vwlmm") or []]
    except metadata.PackageNotFoundError:  # the source code alone, which nothing has installed
        return error
    wrong = []
    for requirement in requirements:
        if requirement.marker is not None:  # of an extra
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier}, found {found}")
    return ImportError(f"{error}: modeling_vwlmm works with {'; '.join(wrong)}") if wrong else error
