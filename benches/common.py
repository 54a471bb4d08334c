"""What the benchmarks share: interleaved timing, the description of the machine, JSON and Markdown."""

from __future__ import annotations

import ctypes
import datetime
import importlib
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

Block = Callable[[int], Sequence[int]]  # times n calls, returns nanoseconds of each


def engines_folder(given: str | None) -> Path:
    folder = given or os.environ.get("JETRT_TEST_ENGINES")
    if not folder or not Path(folder).is_dir():
        raise SystemExit("no folder of test engines: pass --engines or set JETRT_TEST_ENGINES")
    return Path(folder)


def nvinfer_path() -> str:
    """The libnvinfer that jetrt uses, so that every row of a table runs on the same library."""
    import jetrt

    jetrt.library_info()  # opens it
    loaded = mapped("libnvinfer.so")
    if len(loaded) != 1:
        raise SystemExit(f"expected one libnvinfer in this process, found {loaded}")
    return loaded[0]


def mapped(name: str) -> list[str]:
    """Files of this process whose name starts with `name`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return sorted(p for p in paths if Path(p).name.startswith(name))


def compile_floor(source: str = "floor.c") -> ctypes.CDLL:
    """`source` is floor.c, or a file that includes it."""
    library = Path(tempfile.mkdtemp(prefix="jetrt-floor-")) / "libfloor.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / source), "-ldl"], check=True)
    floor = ctypes.CDLL(str(library))
    floor.floor_open.restype = ctypes.c_void_p
    floor.floor_open.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    floor.floor_error.restype = ctypes.c_char_p
    floor.floor_error.argtypes = [ctypes.c_void_p]
    floor.floor_graph_nodes.restype = ctypes.c_int64
    floor.floor_graph_nodes.argtypes = [ctypes.c_void_p]
    floor.floor_shape.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64),
    ]  # fmt: skip
    floor.floor_prepare.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    floor.floor_enqueue.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    floor.floor_time.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    floor.floor_close.argtypes = [ctypes.c_void_p]
    return floor


class Floor:
    """floor.c on one plan and one stream; raises where it reports an error."""

    ENQUEUE, ADDRESSES, SHAPES, GRAPH, OTHER_ADDRESSES, OTHER_SHAPES = range(6)

    def __init__(
        self, library: ctypes.CDLL, plan: Path, shapes: Sequence[dict[str, Sequence[int]]], stream: int
    ) -> None:
        self.library = library
        self.handle = library.floor_open(nvinfer_path().encode(), str(plan).encode())
        if library.floor_error(self.handle):
            raise RuntimeError(library.floor_error(self.handle).decode())
        for turn, by_name in enumerate(shapes):
            for name, dims in by_name.items():
                array = (ctypes.c_int64 * len(dims))(*dims)
                self.check(library.floor_shape(self.handle, name.encode(), turn, len(dims), array))
        self.check(library.floor_prepare(self.handle, stream))

    def check(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(self.library.floor_error(self.handle).decode())

    @property
    def graph_nodes(self) -> int:
        return int(self.library.floor_graph_nodes(self.handle))

    def enqueue(self, stream: int) -> None:
        self.check(self.library.floor_enqueue(self.handle, stream))

    def block(self, mode: int) -> Block:
        def run(n: int) -> Sequence[int]:
            out = (ctypes.c_uint64 * n)()
            self.check(self.library.floor_time(self.handle, mode, n, out))
            return list(out)

        return run

    def close(self) -> None:
        self.library.floor_close(self.handle)


def python_block(call: Callable[[], Any], drain: Callable[[], Any], keep_last: bool = False) -> Block:
    """Times `call()` one by one, on a drained GPU. A result is dropped at once unless `keep_last`."""

    def run(n: int) -> Sequence[int]:
        clock = time.perf_counter_ns
        samples = [0] * n
        held = None
        for _ in range(3):
            call()
        drain()
        if keep_last:
            for i in range(n):
                start = clock()
                held = call()
                samples[i] = clock() - start
        else:
            for i in range(n):
                start = clock()
                call()
                samples[i] = clock() - start
        drain()
        del held
        return samples

    return run


def interleave(rows: dict[str, Block], rounds: int, block: int) -> dict[str, list[int]]:
    """Every row once a round, in a new order each round; the first round is thrown away."""
    order = list(rows)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[int]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        shuffle(order)
        for name in order:
            got = rows[name](block)
            if turn > 0:
                samples[name].extend(got)
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "samples": len(ordered),
    }


def version_of(module: str) -> str | None:
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except ImportError:
        return None


def clocks() -> dict[str, Any]:
    """State of GPU 0 now; `unknown` carries the reason when NVML cannot be asked."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
        state = {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "max_sm_mhz": nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "temperature_c": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            "power_w": round(nvml.nvmlDeviceGetPowerUsage(gpu) / 1000, 1),
        }
        # pynvml renamed the call; either gives the same bits.
        throttle = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None
        )
        state["throttle_reasons"] = hex(throttle(gpu)) if throttle else None
        return state
    except Exception as error:  # the figures stand without it, and say so
        return {"unknown": f"{type(error).__name__}: {error}"}


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """GPU, driver, CPU and versions; reads nothing that names a user or a host."""
    import jetrt

    info: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *relative_command()]),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "jetrt": plain(jetrt._core.build_info()),
        "libraries": {
            key: value for key, value in plain(jetrt.library_info()).items() if not str(value).startswith("/")
        },
        "versions": {
            name: version
            for name in ("torch", "numpy", "cupy", "jax", "tensorrt", "tensorrt_bindings")
            if (version := version_of(name)) is not None
        },
    }
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        info["gpu"] = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(0))
        info["driver"] = nvml.nvmlSystemGetDriverVersion()
    except Exception:
        import torch

        info["gpu"] = torch.cuda.get_device_name(0)
        info["driver"] = None
    return info


def relative_command() -> list[str]:
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(HERE.parent) if script.is_relative_to(HERE.parent) else script.name
    # A path of this machine says nothing to a reader of the figures.
    return [str(name), *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])]


def plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write(name: str | Path, result: dict[str, Any]) -> Path:
    path = Path(name)
    if path.suffix != ".json":
        path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(result), indent=1) + "\n")
    return path


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def target(name: str, measured: float, limit: float, unit: str) -> dict[str, Any]:
    return {"target": name, "measured": measured, "limit": limit, "unit": unit, "met": measured <= limit}


def print_targets(targets: Sequence[dict[str, Any]]) -> None:
    print()
    for t in targets:
        verdict = "met" if t["met"] else "MISSED"
        print(f"{verdict:6} {t['target']}: {t['measured']:.2f} {t['unit']}, limit {t['limit']:.2f}")
