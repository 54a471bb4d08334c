"""NVML as a source, through NVIDIA's `nvidia-ml-py` (module `pynvml`).

Its answers are taken one by one: a platform may support some of them, and report success with values that cannot be.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from .reading import Absent, Sample

__all__ = ["PACKAGE", "NvmlSource"]

PACKAGE: Final = "nvidia-ml-py"

# NVML's return codes, which pynvml's exceptions carry as `value`.
_UNINITIALIZED, _NOT_SUPPORTED, _LIBRARY_NOT_FOUND, _FUNCTION_NOT_FOUND = 1, 3, 12, 13
_GPU_IS_LOST, _RESET_REQUIRED, _DEPRECATED = 15, 16, 26
_NOT_HERE: Final = (_NOT_SUPPORTED, _FUNCTION_NOT_FOUND, _DEPRECATED)
_REOPEN: Final = (_UNINITIALIZED, _GPU_IS_LOST, _RESET_REQUIRED)

#: Bits of nvmlDeviceGetCurrentClocksEventReasons. Bit 0, idle, holds nothing down.
REASONS: Final = {
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
THERMAL: Final = 0x20 | 0x40
POWER: Final = 0x4 | 0x80

#: GPUs inside the processor; GB10 is DGX Spark's.
_INTEGRATED = re.compile(r"\b(Orin|Thor|Xavier|Tegra|GB10)\b|nvgpu")


class NvmlSource:
    """The GPU that CUDA calls `device`. NVML is opened on the thread that asks, since it does not survive a fork."""

    name = "nvml"

    def __init__(self, device: int = 0) -> None:
        self._device = device
        self._nvml: Any = None
        self._gpu: Any = None
        self._discrete = False

    def sample(self) -> Sample:
        if self._gpu is None:
            self._open()
        look = _Look(self._nvml, self._gpu)
        try:
            return {"discrete_gpu": self._discrete, **look.values()}
        except Exception:
            self._gpu = None  # opened anew next time
            raise

    def _open(self) -> None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == "pynvml"
            reason = f"the package {PACKAGE} is not installed" if missing else f"pynvml cannot be imported: {error}"
            raise Absent(reason, lasting=True) from error
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            code = getattr(error, "value", None)
            what = "there is no libnvidia-ml.so.1" if code == _LIBRARY_NOT_FOUND else f"nvmlInit: {_text(error)}"
            raise Absent(what) from error
        self._nvml = nvml
        gpu = _handle(nvml, self._device, os.environ)
        name = _decoded(nvml.nvmlDeviceGetName(gpu))
        if "nvgpu" in name:
            # Everything of use is unsupported there, and some releases report success with zeros and garbage.
            raise Absent(f"NVML measures nothing on {name}", lasting=True)
        self._discrete = _INTEGRATED.search(name) is None
        self._gpu = gpu

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()


class _Look:
    def __init__(self, nvml: Any, gpu: Any) -> None:
        self.nvml, self.gpu = nvml, gpu
        self.unreadable: list[str] = []

    def values(self) -> dict[str, Any]:
        nvml = self.nvml
        degrees = self.ask("temperature", "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        if degrees is None:
            # The call above is to go with CUDA 14.
            degrees = self.ask("temperature", "nvmlDeviceGetTemperatureV", nvml.NVML_TEMPERATURE_GPU)
        load = self.ask("utilization", "nvmlDeviceGetUtilizationRates", read=lambda rates: rates.gpu)
        milliwatts = self.whole("power", self.ask("power", "nvmlDeviceGetPowerUsage"), 5_000_000)
        reasons = self.ask("clock event reasons", "nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self.ask("clock event reasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        bits = self.whole("clock event reasons", reasons, 0xFFFF, zero=True)
        load = self.whole("utilization", load, 100, zero=True)
        return {
            "gpu_temp_c": self.whole("temperature", degrees, 150, least=-40, convert=float),
            "gpu_clock_mhz": self.clock("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "gpu_clock_max_mhz": self.clock("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self.clock("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "gpu_load": None if load is None else load / 100,
            "power_w": None if milliwatts is None else milliwatts / 1000,
            "throttle_active": None if bits is None else bits & THERMAL != 0,
            "power_throttle_active": None if bits is None else bits & POWER != 0,
            "reasons": tuple(name for bit, name in REASONS.items() if (bits or 0) & bit),
            "unreadable": tuple(dict.fromkeys(self.unreadable)),
        }

    def ask(self, what: str, function: str, *arguments: Any, read: Callable[[Any], Any] | None = None) -> Any:
        """``None`` where this NVML, driver or GPU does not have it."""
        call = getattr(self.nvml, function, None)
        if call is None:
            return None
        try:
            found = call(self.gpu, *arguments)
            return found if read is None else read(found)
        except Exception as error:
            code = getattr(error, "value", None)
            if code in _REOPEN:
                raise
            if code not in _NOT_HERE:
                self.unreadable.append(f"nvml {what}")
            return None

    def whole(
        self,
        what: str,
        found: Any,
        most: int,
        *,
        least: int = 1,
        zero: bool = False,
        convert: Callable[[int], Any] = int,
    ) -> Any:
        """Within bounds. Zero is what an unsupported sensor says, unless it is allowed."""
        if found is None or (found == 0 and not zero):
            return None
        if isinstance(found, int) and (least <= found <= most or found == 0):
            return convert(found)
        self.unreadable.append(f"nvml {what}")
        return None

    def clock(self, function: str, kind: int) -> Any:
        return self.whole("clocks", self.ask("clocks", function, kind), 20_000)


def _handle(nvml: Any, device: int, environment: Mapping[str, str]) -> Any:
    # NVML counts all GPUs in the order of the bus; CUDA counts those of CUDA_VISIBLE_DEVICES, in an order of its own.
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    wanted = str(device)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")] if visible.strip() else []
        if device >= len(names):
            raise Absent(f"CUDA_VISIBLE_DEVICES={visible!r} has no device {device}", lasting=True)
        wanted = names[device]
    if wanted.startswith("MIG-"):
        instance = nvml.nvmlDeviceGetHandleByUUID(wanted)
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
    gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if not wanted.isdecimal():
        # CUDA takes the beginning of a UUID for the whole.
        matching = [gpu for gpu in gpus if wanted and _decoded(nvml.nvmlDeviceGetUUID(gpu)).startswith(wanted)]
        if len(matching) != 1:
            raise Absent(f"NVML knows {len(matching)} GPUs by {wanted!r} of CUDA_VISIBLE_DEVICES")
        return matching[0]
    if int(wanted) >= len(gpus):
        raise Absent(f"NVML has {len(gpus)} GPUs, and no number {wanted}")
    by_bus = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not by_bus and len({_decoded(nvml.nvmlDeviceGetName(gpu)) for gpu in gpus}) > 1:
        raise Absent(
            f"which of {len(gpus)} different GPUs CUDA counts as {wanted} is not known; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name a UUID in CUDA_VISIBLE_DEVICES"
        )
    return gpus[int(wanted)]


def _decoded(text: str | bytes) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # pynvml asks the library for the words
        return f"NVML error {getattr(error, 'value', '?')}"
