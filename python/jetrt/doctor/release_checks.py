"""Releases that are known to be bad, alone or together: `known_bad.json`, matched with what is here.

An entry fires when everything that it names holds: ``l4t``, ``tensorrt`` and ``version`` (of ``package``) are ranges as
in the known failures, ``soc`` and ``tegra`` say on which machine, ``unless_package`` takes it back. What is unknown
matches nothing.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..environment import used_by_jetrt
from ..known_failures import version_in
from .facts import Facts
from .finding import Finding
from .versions import numbers


@functools.cache
def entries() -> tuple[dict[str, Any], ...]:
    rows = json.loads(Path(__file__).with_name("known_bad.json").read_text(encoding="utf-8"))
    return tuple(rows)


def known_bad_releases(facts: Facts) -> Iterator[Finding]:
    here = facts.environment
    library = used_by_jetrt(here.libraries)
    tensorrt = facts.machine.tensorrt if facts.machine else library.version if library else None
    shown = {"tensorrt": tensorrt, "python": shlex.quote(here.python.executable or "python3")}
    for entry in entries():
        if _holds(entry, facts, tensorrt):
            yield Finding(
                entry["id"],
                entry["severity"],
                _filled(entry["what"], shown),
                f"{entry['why']} (source: {entry['source']})",
                tuple(_filled(line, shown) for line in entry["fix"]),
            )


def _holds(entry: dict[str, Any], facts: Facts, tensorrt: str | None) -> bool:
    here = facts.environment
    package = entry.get("package")
    checks = {
        "l4t": here.platform.l4t,
        "tensorrt": tensorrt,
        "version": here.version_of(package) if package else None,
    }
    for key, found in checks.items():
        # A version that is known less deeply than the range ("10" for 10.10-10.15) matches nothing.
        if key in entry and (len(numbers(found)) < 2 or not version_in(numbers(found), entry[key])):
            return False
    if "soc" in entry and here.system.soc != entry["soc"]:
        return False
    if entry.get("tegra") and not here.tegra:
        return False
    return entry.get("unless_package") not in here.packages


def _filled(text: str, values: dict[str, Any]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


CHECKS: Final = (known_bad_releases,)
