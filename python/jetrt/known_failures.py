"""Known failures of TensorRT: a table (`known_failures.json`) from log lines to cause and next step, and its use.

An entry fires when its ``pattern`` is found in the lines, ``also`` (if there) somewhere in them too, the version of
TensorRT is one of ``versions``, the stage is one of ``applies``, the GPU's name matches ``gpu``, and no entry named in
``unless`` fired. ``source`` says who recorded it, ``examples`` are the recorded lines, and a test holds both together.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from .errors import JetrtError

__all__ = ["Entry", "Finding", "Stage", "attach", "entries", "explain", "version_in"]

Stage = Literal["build", "load", "run"]
#: "failure" explains why something failed; "accuracy" says that numbers may be wrong although nothing failed (what
#: ``--strict`` refuses); "note" is worth knowing.
Kind = Literal["failure", "accuracy", "note"]
Version = tuple[int, ...]

_Error = TypeVar("_Error", bound=JetrtError)


class Entry(NamedTuple):
    """One row of the table, as the file has it."""

    id: str
    kind: Kind
    pattern: str
    cause: str
    next_step: str
    #: "any", or a list of ">=10.14", "<10.8", "10.0-10.7" (10.7.1 is inside) between commas.
    versions: str
    applies: Sequence[Stage]
    source: str
    examples: Sequence[str]
    also: str | None = None
    unless: Sequence[str] = ()
    gpu: str | None = None


@dataclass(frozen=True)
class Finding:
    """An entry that fired."""

    id: str
    kind: Kind
    cause: str
    next_step: str
    versions: str
    source: str
    #: The first line that it fired on.
    line: str
    #: How many times its pattern was found.
    count: int

    def text(self) -> str:
        """Cause, next step, the line and where this is known from, as a paragraph of the error message."""
        times = f" ({self.count} times)" if self.count > 1 else ""
        known = self.source if self.versions == "any" else f"{self.source}; TensorRT {self.versions}"
        return (
            f"Known {'failure' if self.kind == 'failure' else 'trap'} {self.id!r}: {self.cause}\n"
            f"  next step: {self.next_step}\n"
            f"  seen: {_shorten(self.line)}{times}\n"
            f"  source: {known}"
        )

    def to_mapping(self) -> dict[str, Any]:
        return dict(vars(self))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The table, in order of the file: a special case stands before the general one."""
    rows = json.loads(Path(__file__).with_name("known_failures.json").read_text(encoding="utf-8"))
    return tuple(Entry(**row) for row in rows)


def version_in(version: Version | None, ranges: str) -> bool:
    """Whether `version` (major, minor, patch) lies in `ranges`. An unknown version lies in every range: a hint too
    many does less harm than one that is missing."""
    if version is None or ranges == "any":
        return True
    return any(_inside(version, part.strip()) for part in ranges.split(","))


def _inside(version: Version, text: str) -> bool:
    operator, low, high = re.fullmatch(r"(>=|<)?(\d+(?:\.\d+)*)(?:-(\d+(?:\.\d+)*))?", text).groups()  # type: ignore[union-attr]
    bound = _numbers(low)
    if operator == "<":
        return version[: len(bound)] < bound
    if version[: len(bound)] < bound:
        return False
    if high is None:
        return operator == ">=" or version[: len(bound)] == bound
    bound = _numbers(high)
    return version[: len(bound)] <= bound


def _numbers(text: str) -> Version:
    return tuple(map(int, re.findall(r"\d+", text)))


def explain(
    lines: Iterable[str | tuple[int, str]],
    *,
    tensorrt: Version | str | None,
    stage: Stage,
    gpu: str | None = None,
) -> list[Finding]:
    """What the table says about `lines`: log lines, or (severity, line) pairs.

    `tensorrt` is the version of the library, as (major, minor, patch) or "10.6.0.26"; `gpu` the name of the GPU, where
    it is known ("NVIDIA Thor"). An unknown version or GPU rules nothing out. The findings are in the table's order.
    """
    text = "\n".join(line if isinstance(line, str) else line[1] for line in lines)
    version = _numbers(tensorrt) if isinstance(tensorrt, str) else tensorrt
    found: dict[str, Finding] = {}
    for entry in entries():
        if (
            stage not in entry.applies
            or not version_in(version, entry.versions)
            or (gpu is not None and entry.gpu is not None and not re.search(entry.gpu, gpu))
            or any(other in found for other in entry.unless)
            or (entry.also is not None and not re.search(entry.also, text))
        ):
            continue
        matches = list(re.finditer(entry.pattern, text))
        if matches:
            found[entry.id] = Finding(
                id=entry.id,
                kind=entry.kind,
                cause=entry.cause,
                next_step=entry.next_step,
                versions=entry.versions,
                source=entry.source,
                line=_line_at(text, matches[0].start()),
                count=len(matches),
            )
    return list(found.values())


def attach(
    error: _Error,
    lines: Iterable[str | tuple[int, str]] | None = None,
    *,
    tensorrt: Version | str | None,
    stage: Stage,
    gpu: str | None = None,
) -> _Error:
    """Adds what the table says to the message of `error` and sets its ``findings``; returns the same error.

    Without `lines` they are the error's own: its log and what the parser complained about, else its message. An error
    that has ``findings`` stays as it is, so that every layer may call this and the first one counts. Notes are kept in
    ``findings`` but stay out of the message when there is a cause.
    """
    if getattr(error, "findings", None) is not None:
        return error
    if lines is None:
        problems = getattr(error, "problems", None) or []
        lines = [*(getattr(error, "log", None) or []), *(str(problem.get("reason", "")) for problem in problems)]
        lines = lines or [error.message]
    findings = explain(lines, tensorrt=tensorrt, stage=stage, gpu=gpu)
    error.findings = findings  # type: ignore[attr-defined]
    shown = [finding for finding in findings if finding.kind == "failure"] or findings
    if shown:
        error.message = "\n\n".join([error.message, *(finding.text() for finding in shown)])
        error.args = (error.message,)
    return error


def _line_at(text: str, position: int) -> str:
    end = text.find("\n", position)
    return text[text.rfind("\n", 0, position) + 1 : None if end < 0 else end]


def _shorten(line: str, width: int = 240) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"
