"""Whether a package is there, and whether it can be imported: a broken one is named with its error."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys


def broken(package: str, step: str, *, deep: bool) -> list[str]:
    """Why the package cannot be used, as a list of at most one sentence; empty when it can.

    `deep` imports it, which is the only way to know; otherwise it is only looked for.
    """
    if sys.modules.get(package) is not None:
        return []
    try:
        if importlib.util.find_spec(package) is None:
            return [f"the package {package} ({step})"]
    except (ImportError, ValueError):  # what was imported under the name has no spec, or is None
        return [f"the package {package} ({step})"]
    if deep:
        try:
            importlib.import_module(package)
        except BaseException as error:  # a package may raise anything while it is imported
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())
            return [f"the package {package}, which is installed and fails when it is imported ({why}); {step}"]
    return []


def version_of(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
