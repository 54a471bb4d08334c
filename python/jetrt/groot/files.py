"""Where the plans of a policy lie, under the names that the scripts give them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

#: The DiT's, newest name first.
DIT = ("dit_bf16.engine", "dit_model_bf16.engine", "dit_model_bf16.trt")


def dit_plan(path: str | os.PathLike[str]) -> Path:
    """The DiT's plan: the path itself, or the one in the folder that the scripts would take."""
    if not Path(path).is_dir():
        return Path(path)
    for name in DIT:
        if (Path(path) / name).exists():
            return Path(path) / name
    raise _none(path, "DiT", DIT)


def backbone_plan(path: str | os.PathLike[str]) -> Path:
    """The backbone's plan: the path itself, or the only one in the folder that is called backbone…"""
    if not Path(path).is_dir():
        return Path(path)
    found = sorted(f for f in Path(path).glob("*backbone*") if f.suffix in (".engine", ".trt", ".plan"))
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise FileNotFoundError(
            errno.ENOENT, f"found several backbones ({names}); allowed: one. Name the file", os.fspath(path)
        )
    if not found:
        raise _none(path, "backbone", ("*backbone*.engine", "*backbone*.trt"))
    return found[0]


def _none(path: str | os.PathLike[str], what: str, names: tuple[str, ...]) -> FileNotFoundError:
    return FileNotFoundError(
        errno.ENOENT, f"the folder has no plan of the {what}; allowed: {', '.join(names)}", os.fspath(path)
    )
