"""The kernel's files as a source: Jetson's GPU, and the processor's temperature on any machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import platform
from .._core import _Sysfs
from .reading import Sample

__all__ = ["SysfsSource"]


class SysfsSource:
    """Reads below `root`, without the GIL."""

    name = "sysfs"

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._root = Path(root)
        self._files = _Sysfs(root)
        self._known: tuple[object, str | None] = (None, None)

    def sample(self) -> Sample:
        return {**self._files.sample(), "power_mode": self._power_mode()}

    def _power_mode(self) -> str | None:
        # What nvpmodel recorded changes once in a while, so that the identity of its files is asked and not their text.
        files = (self._root / "var/lib/nvpmodel/status", self._root / "etc/nvpmodel.conf")
        now = [_identity(path) for path in files]
        if self._known[0] != now:
            self._known = (now, platform.identify(self._root).power_mode)
        return self._known[1]

    def close(self) -> None:
        """Nothing is held open."""


def _identity(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
