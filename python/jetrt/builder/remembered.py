"""Optimisation levels that crashed or hung in an earlier run of `--opt-level auto`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineBuildError
from ..provenance.publish import engine_lock, replace_text

if TYPE_CHECKING:
    from .levels import LevelRow

__all__ = ["Remembered"]

log = logging.getLogger("jetrt.build")


class Remembered:
    """Levels that crashed or hung on the same library, GPU and model, in a file of the user's cache folder.

    A file that is damaged counts as empty; a folder that cannot be written costs a warning and nothing else.
    """

    _ENTRIES = 1000

    def __init__(
        self,
        *,
        tensorrt: str,
        gpu: str,
        sm_count: int | None,
        model_sha256: str,
        options: Mapping[str, Any],
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        """`options` are those that shape the precision; they must be plain JSON."""
        self._identity = {
            "tensorrt": tensorrt,
            "gpu": gpu,
            "sm_count": sm_count,
            "model": model_sha256,
            "options": dict(options),
        }
        text = json.dumps(self._identity, sort_keys=True, separators=(",", ":"))
        self._key = hashlib.sha256(text.encode()).hexdigest()
        self.path = Path(path) if path is not None else _cache_folder() / "levels.json"

    def levels(self) -> dict[int, str]:
        """Level -> what happened, as a sentence."""
        known: dict[int, str] = {}
        for level, what in self._levels(self._read()).items():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                known[int(level)] = f"An earlier run saw a {what['how']} ({what['stage']}, {what['when']})."
        return known

    def update(self, rows: Iterable[LevelRow]) -> None:
        """Notes what crashed or hung, and forgets what works again. If nothing worked, the levels are not the cause
        and nothing is noted."""
        rows = list(rows)
        works = {str(row.level) for row in rows if row.state in ("chosen", "slower", "tie", "not timed")}
        crashed = [row for row in rows if row.state == "failed" and _level_is_at_fault(row)]
        if not works or not (crashed or self._levels(self._read())):
            return
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with engine_lock(self.path, timeout=10):
                entries = self._read()
                levels = {level: what for level, what in self._levels(entries).items() if level not in works}
                for row in crashed:
                    levels[str(row.level)] = {"how": row.how, "stage": row.stage, "reason": row.reason, "when": when}
                entries.pop(self._key, None)
                if levels:
                    entries[self._key] = {**self._identity, "levels": levels}  # the newest is the last
                newest = dict(list(entries.items())[-self._ENTRIES :])
                replace_text(self.path, json.dumps({"schema": "jetrt-levels-1", "entries": newest}, indent=1))
        except (OSError, EngineBuildError) as error:
            log.warning("%s: crashed levels could not be remembered: %s", self.path, error)

    def _levels(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        entry = entries.get(self._key)
        levels = entry.get("levels") if isinstance(entry, dict) else None
        return levels if isinstance(levels, dict) else {}

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_bytes())
            entries = data["entries"]
            if not isinstance(entries, dict):
                raise TypeError("its entries are no mapping")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s is damaged and counts as empty: %s", self.path, error)
            return {}
        return entries


def _level_is_at_fault(row: LevelRow) -> bool:
    """A crash, or a run that hangs; a build may be given more time, and memory be free the next time."""
    return row.how == "crash" or (row.how == "timeout" and row.stage in ("run", "race"))


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "jetrt"
