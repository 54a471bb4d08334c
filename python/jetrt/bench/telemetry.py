"""Temperatures, clocks and power beside a row, and peaks of memory. What cannot be read is ``None``."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import JetrtError

__all__ = ["HostMemory", "Reading", "Telemetry", "settings"]

# What a sensor can mean; anything else (negative clocks, 1e9 degrees, NaN) is garbage and left blank.
_PLAUSIBLE = {
    "cpu_temp_c": (-60.0, 150.0),
    "gpu_temp_c": (-60.0, 150.0),
    "gpu_clock_mhz": (1.0, 10_000.0),
    "gpu_clock_max_mhz": (1.0, 10_000.0),
    "memory_clock_mhz": (1.0, 50_000.0),
    "gpu_load": (0.0, 1.0),
    "power_w": (0.0, 5_000.0),
}


@dataclass(frozen=True)
class Reading:
    """One look at the sensors."""

    cpu_temp_c: float | None = None
    gpu_temp_c: float | None = None
    gpu_clock_mhz: float | None = None
    gpu_clock_max_mhz: float | None = None
    memory_clock_mhz: float | None = None
    gpu_load: float | None = None
    power_w: float | None = None
    power_mode: str | None = None
    #: Whether heat, and whether power, holds clocks down; ``None``: unknown.
    throttle_active: bool | None = None
    power_throttle_active: bool | None = None
    #: What does, of both kinds.
    reasons: tuple[str, ...] = ()
    #: What was read and cannot be: "gpu_clock_mhz is -5".
    garbage: tuple[str, ...] = ()

    @classmethod
    def of(cls, snapshot: Any) -> Reading:
        """From a snapshot of `jetrt.thermal`, with what no sensor can mean left out."""
        values: dict[str, float | None] = {}
        garbage = []
        for name, (low, high) in _PLAUSIBLE.items():
            value = getattr(snapshot, name, None)
            if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
                values[name] = None
            elif math.isfinite(value) and low <= value <= high:
                values[name] = float(value)
            else:
                values[name] = None
                garbage.append(f"{name} is {value}")
        mode = getattr(snapshot, "power_mode", None)
        return cls(
            **values,
            power_mode=str(mode) if mode is not None else None,
            throttle_active=getattr(snapshot, "throttle_active", None),
            power_throttle_active=getattr(snapshot, "power_throttle_active", None),
            reasons=tuple(map(str, getattr(snapshot, "reasons", ()) or ())),
            garbage=tuple(garbage),
        )

    def to_mapping(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return {**found, "reasons": list(self.reasons), "garbage": list(self.garbage)}


class Telemetry:
    """Readings of `jetrt.thermal`'s monitor. Where there is none, `problem` says why and readings are ``None``."""

    def __init__(self, device: int = 0) -> None:
        self.problem: str | None = None
        #: Whether there were readings and all were empty.
        self.silent: bool | None = None
        self._monitor: Any = None
        try:
            self._monitor = importlib.import_module("jetrt.thermal").monitor(device)
        except (ImportError, AttributeError, OSError, RuntimeError, JetrtError) as error:
            self.problem = f"{type(error).__name__}: {error}"

    def read(self) -> Reading | None:
        if self._monitor is None:
            return None
        try:
            found = Reading.of(self._monitor.snapshot())
            self.silent = self.silent is not False and found == Reading(power_mode=found.power_mode)
            return found
        except (AttributeError, OSError, RuntimeError, JetrtError) as error:
            self.problem = f"{type(error).__name__}: {error}"
            return None


# -------------------------------------------------------------------------------------------------------------- memory


class HostMemory:
    """The largest resident size of this process since it was made, and what it was then, in bytes."""

    def __init__(self, root: str | os.PathLike[str] = "/proc/self") -> None:
        self._root = Path(root)
        self.resettable = False
        with contextlib.suppress(OSError):
            (self._root / "clear_refs").write_text("5")  # sets the peak back to what is resident now
            self.resettable = True
        self.before = self._status("VmRSS")

    def peak(self) -> int | None:
        """``None`` where the kernel does not let the peak be set back: it would be that of an earlier row."""
        return self._status("VmHWM") if self.resettable else None

    def _status(self, name: str) -> int | None:
        with contextlib.suppress(OSError):
            text = (self._root / "status").read_text()
            match = re.search(rf"^{name}:\s+(\d{{1,15}}) kB$", text, re.M | re.ASCII)
            return int(match[1]) << 10 if match else None
        return None


# ------------------------------------------------------------------------------------------------------------ settings


def settings() -> dict[str, Any]:
    """What decides about TF32 and about when kernels are loaded; torch is asked only where it is imported already."""
    found: dict[str, Any] = {name: os.environ.get(name) for name in ("NVIDIA_TF32_OVERRIDE", "CUDA_MODULE_LOADING")}
    if "libcuda" in _mapped():
        from ._cuda import loading_mode

        found["module_loading"] = loading_mode()
    torch = sys.modules.get("torch")
    if torch is not None:
        with contextlib.suppress(AttributeError, RuntimeError):
            found["torch.backends.cuda.matmul.allow_tf32"] = bool(torch.backends.cuda.matmul.allow_tf32)
            found["torch.backends.cudnn.allow_tf32"] = bool(torch.backends.cudnn.allow_tf32)
    return found


def _mapped() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/self/maps").read_text()
    return ""
