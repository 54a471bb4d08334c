"""PyTorch's memory settings in one call, with what each does where the GPU shares the system's memory."""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from . import platform
from .errors import JetrtError
from .report import table

__all__ = ["TorchMemory", "TorchMemoryError", "configure_torch_memory"]

#: Every torch reads the first name; newer ones read the second too, and which of the two wins depends on the version.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

#: What each setting does, discrete GPU or not, and what is special where memory is shared.
EFFECTS = {
    "expandable_segments": (
        "the allocator's segments grow in place instead of leaving holes of the wrong size. On unified memory every "
        "hole is memory that the system and TensorRT lack too; some Jetson releases fail at the first allocation with "
        "it, which is why it is probed."
    ),
    "garbage_collection_threshold": (
        "once this share of what torch may take is in use, freed blocks go back to the driver before new ones are "
        "asked for. On unified memory that leaves them to TensorRT, to the page cache and to other programs. torch "
        "acts on it only where a memory fraction is set."
    ),
    "max_split_size_mb": (
        "larger blocks are not split, which keeps large holes whole; more memory stays unused inside them. The same on "
        "unified memory. Not needed beside expandable_segments."
    ),
    "memory_fraction": (
        "torch raises OutOfMemoryError above this share of the GPU's memory. On unified memory that total is the "
        "system's: without a cap torch's cache can take what the kernel needs, and the process is killed instead of "
        "told. TensorRT's own memory is not under the cap."
    ),
}

_PROBE = """
import torch
first = torch.zeros(3 << 20, dtype=torch.uint8, device={device!r})
second = torch.zeros(64 << 20, dtype=torch.uint8, device={device!r})
del first
third = torch.ones(96 << 20, dtype=torch.uint8, device={device!r})
assert int(third[-1]) == 1 and int(second[0]) == 0
torch.cuda.synchronize()
segments = torch.cuda.memory_snapshot()
assert any(segment.get("is_expandable") for segment in segments), "the segments are not expandable"
print("expandable segments work")
"""


class TorchMemoryError(JetrtError, RuntimeError):
    """A memory setting of torch can no longer take effect, or contradicts one that is in the environment."""

    setting: str | None = None
    found: Any = None
    allowed: Any = None


@dataclass(frozen=True)
class TorchMemory:
    """What `configure_torch_memory` set. ``str()`` is a table with what each setting does."""

    #: The allocator's settings as torch will read them: name -> value. Those that were there before are among them.
    settings: dict[str, str]
    #: Names and value of the environment variables; empty if there is nothing to set.
    environment: dict[str, str]
    #: Share of the GPU's memory that torch may take, and the same in bytes; None: no cap was set by this call.
    memory_fraction: float | None
    memory_bytes: int | None
    #: Whether the GPU shares the system's memory, as Jetson and DGX Spark do; None: nothing says so.
    integrated: bool | None
    #: Why a setting is as it is, by its name: the probe's result, or that it was in the environment before.
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        values = dict(self.settings)
        if self.memory_fraction is not None:
            values["memory_fraction"] = f"{self.memory_fraction} ({self.memory_bytes} bytes)"
        rows = [[name, values.get(name, "not set"), self.reasons.get(name, "")] for name in EFFECTS]
        notes = [f"{name}: {text}" for name, text in EFFECTS.items() if name in values]
        return "\n".join([table(["setting", "value", "why"], rows), *notes])


def configure_torch_memory(
    expandable_segments: bool | Literal["auto"] | None = "auto",
    garbage_collection_threshold: float | None = None,
    memory_fraction: float | None = None,
    *,
    max_split_size_mb: int | None = None,
    device: int = 0,
) -> TorchMemory:
    """Sets how PyTorch's CUDA allocator takes and keeps memory.

    The first two and `max_split_size_mb` are read once, when torch initialises CUDA: they must be set before, whether
    or not torch is imported already. `memory_fraction` may be set at any time; setting it initialises CUDA.

    expandable_segments: True, False, None (leave it), or "auto": what the environment says, else on if a child process
        that tries it on this GPU succeeds (some seconds; once per process).
    garbage_collection_threshold: share in (0, 1).
    memory_fraction: share in (0, 1] of the memory of `device`, an ordinal.
    max_split_size_mb: MiB, above 20.

    Settings that are already in the environment are kept unless an argument names them. Child processes inherit all but
    `memory_fraction`. Returns a `TorchMemory`.

    Raises `TorchMemoryError` (which is a RuntimeError) if CUDA is initialised already and a setting would be ignored,
    or if the two environment variables contradict each other; `ValueError` for a value out of its range.
    """
    _check("garbage_collection_threshold", garbage_collection_threshold, 0, 1, closed=False)
    _check("memory_fraction", memory_fraction, 0, 1, closed=True)
    _check("max_split_size_mb", max_split_size_mb, 20, math.inf, closed=False)
    if expandable_segments not in (True, False, None, "auto"):
        raise ValueError(f"expandable_segments: found {expandable_segments!r}; allowed: True, False, None, 'auto'")

    before = _environment()
    settings, reasons = dict(before), dict.fromkeys(before, "in the environment before")
    asked: dict[str, str] = {}
    if garbage_collection_threshold is not None:
        asked["garbage_collection_threshold"] = repr(float(garbage_collection_threshold))
    if max_split_size_mb is not None:
        asked["max_split_size_mb"] = str(int(max_split_size_mb))
    initialized = _initialized()
    if expandable_segments == "auto":
        if "expandable_segments" in before:
            pass
        elif initialized:
            reasons["expandable_segments"] = "left as it is: CUDA is initialised"
        else:
            works, why = _expandable_segments_work(device)
            reasons["expandable_segments"] = why
            if works:
                asked["expandable_segments"] = "True"
    elif expandable_segments is not None:
        asked["expandable_segments"] = str(bool(expandable_segments))

    changed = {name: value for name, value in asked.items() if before.get(name) != value}
    if changed and initialized:
        name, value = next(iter(changed.items()))
        raise TorchMemoryError(
            f"{name}: found CUDA initialised by torch, which has read {VARIABLES[0]} and would ignore {value}; "
            "allowed: before the first use of CUDA. Call configure_torch_memory first, or start the program with "
            f"{VARIABLES[0]}={_written({**before, **asked})}.",
            setting=name,
            found="CUDA is initialised",
            allowed="before the first use of CUDA",
        )
    settings.update(asked)
    for name in changed:
        reasons.setdefault(name, "asked for")
        if name in before:
            reasons[name] = f"asked for, in place of {before[name]}"
    environment = dict.fromkeys(VARIABLES, _written(settings)) if settings else {}
    os.environ.update(environment)

    total = None
    if memory_fraction is not None:
        total = _cap(memory_fraction, device)
        reasons["memory_fraction"] = "asked for"
    elif "garbage_collection_threshold" in settings:
        reasons["garbage_collection_threshold"] += "; no effect before a memory_fraction is set"
    return TorchMemory(settings, environment, memory_fraction, total, platform.identify().integrated, reasons)


def _check(name: str, value: Any, low: float, high: float, *, closed: bool) -> None:
    if value is None:
        return
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not (low < value < high or (closed and value == high)):
        allowed = f"above {low}" if high == math.inf else f"above {low} and {'up to' if closed else 'below'} {high}"
        raise ValueError(f"{name}: found {value!r}; allowed: a number {allowed}")


def _environment() -> dict[str, str]:
    """The settings that are in the environment."""
    values = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    found = [_parsed(value) for value in values.values()]
    if len(found) == 2 and found[0] != found[1]:
        described = " and ".join(f"{name}={value}" for name, value in values.items())
        raise TorchMemoryError(
            f"{VARIABLES[0]}: found {described}, which differ; allowed: one of the two, or the same in both (which one "
            "counts depends on the version of torch). Unset one.",
            setting=VARIABLES[0],
            found=values,
        )
    return found[0] if found else {}


def _parsed(text: str) -> dict[str, str]:
    # A list in brackets holds commas and colons of its own: "roundup_power2_divisions:[256:1,512:2,>:4]".
    items = re.findall(r"[^,\[\]]+(?:\[[^\]]*\])?", text)
    return {name.strip(): value.strip() for name, _, value in (item.partition(":") for item in items) if name.strip()}


def _written(settings: dict[str, str]) -> str:
    return ",".join(f"{name}:{value}" for name, value in settings.items())


def _initialized() -> bool:
    """Has torch initialised CUDA in this process? Without importing it."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


@functools.cache
def _expandable_segments_work(device: int) -> tuple[bool, str]:
    """Tries them in a child process: on some Jetson releases the first allocation fails."""
    environment = {**os.environ, **dict.fromkeys(VARIABLES, "expandable_segments:True")}
    command = [sys.executable, "-c", _PROBE.format(device=f"cuda:{device}")]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"off: the probe did not finish ({error})"
    if done.returncode == 0:
        return True, "on: a child process used it on this GPU"
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return False, f"off: a child process that tried it failed ({last[:200]})"


def _cap(fraction: float, device: int) -> int:
    import torch

    torch.cuda.set_per_process_memory_fraction(float(fraction), device)
    return int(fraction * torch.cuda.get_device_properties(device).total_memory)
