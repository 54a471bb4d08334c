"""Engines loaded before the policy, largest first and only if they fit, and the record of what each load took.

The wrappers, `replace_*` and `jetrt.groot.engine.Engine` look here by path before they load anything.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import _core, fit, platform, settings

__all__ = ["Load", "load_report", "preload"]

_log = logging.getLogger("jetrt.groot")

Seam = Literal["wrapper", "engine"]


@dataclass
class Load:
    """What loading one engine took."""

    path: str
    #: GPU ordinal.
    device: int
    #: Size of the plan.
    bytes: int
    seconds: float
    #: Host memory above the start that the kernel could not reclaim, at its peak.
    peak_host_bytes: int
    #: Free device memory around the load and at its lowest between, sampled; on a GPU that shares the system's memory,
    #: what programs can get.
    device_free_before: int
    device_free_lowest: int
    device_free_after: int

    @property
    def device_bytes(self) -> int:
        """What the load took of it. Other programs' use in the meantime is in this figure too."""
        return self.device_free_before - self.device_free_after

    @property
    def peak_device_bytes(self) -> int:
        """The same at the peak."""
        return self.device_free_before - self.device_free_lowest


class _Key(NamedTuple):
    path: str
    device: int
    seam: Seam


class _Kept(NamedTuple):
    engine: _core.Engine
    #: Of the file: (inode, size, time of change).
    version: tuple[int, int, int]


_lock = threading.RLock()
_kept: dict[_Key, _Kept] = {}
_loads: list[Load] = []


def load_report() -> list[dict[str, Any]]:
    """What loading each engine of the drop-ins took so far, in order: path, device, bytes (of the plan), seconds,
    peak_host_bytes, peak_device_bytes, device_bytes (what stayed), and the readings of free device memory behind the
    two: device_free_before, device_free_lowest, device_free_after. Sizes in bytes."""
    with _lock:
        return [
            {**asdict(load), "peak_device_bytes": load.peak_device_bytes, "device_bytes": load.device_bytes}
            for load in _loads
        ]


def preload(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    memory_budget: int | str | None = None,
    *,
    device: int = 0,
    seam: Literal["auto", "wrapper", "engine"] = "auto",
) -> list[dict[str, Any]]:
    """Loads engines before the policy takes the memory: the largest first, and none if they cannot all fit.

        jetrt.groot.preload(["backbone.engine", "dit.engine"], memory_budget="6G")
        policy = Gr00tPolicy(...)
        replace_dit_with_tensorrt(policy, "dit.engine")  # finds the engine that is there

    paths: plans; a folder stands for the plans in it.
    memory_budget: device memory that the engines may take, in bytes or as "6G"; None: what is free now.
    device: GPU ordinal.
    seam: who will ask for them: "wrapper" (`TensorRTDiTWrapper`, `TensorRTBackboneWrapper`, `replace_*`), "engine"
        (`jetrt.trt_torch.Engine`, so `setup_tensorrt_engines`), "auto": plans of a folder for "engine", others for
        "wrapper".

    A plan takes at least its own size on the GPU, so that a set whose sizes exceed the budget is refused before the
    first byte is read. What the engines take beyond that is known when each has been loaded: then the rest must still
    fit, or all are closed again.

    Returns the rows of `load_report` for these. Raises `OutOfMemoryError` with the arithmetic, `FileNotFoundError`, and
    what loading an engine raises.
    """
    budget = None if memory_budget is None else fit.read_size(memory_budget, "memory_budget")
    wanted = dict.fromkeys(_wanted(paths, device, seam))
    with _lock:
        missing = [key for key in wanted if key not in _kept or _kept[key].version != _version(key.path)]
        sizes = {key: fit.needs(key.path)[0] for key in missing}
        order = sorted(missing, key=lambda key: sizes[key].certain, reverse=True)
        start = available(device)
        total = platform.meminfo().get("MemTotal", start) if _unified() else start
        allowed, limit = fit.allowance(fit.GpuMemory(start, total, _unified()), budget)
        fit.refuse([sizes[key] for key in order], 0, allowed, limit)
        first = len(_loads)
        done: list[_Key] = []
        try:
            for key in order:
                drop(key)
                _kept[key] = _Kept(load_core(key.path, key.device, key.seam), _version(key.path))
                done.append(key)
                rest = [sizes[key] for key in order[len(done) :]]
                fit.refuse(rest, max(start - available(device), 0), allowed, limit)
        except BaseException:
            for key in done:
                drop(key)
            raise
        return load_report()[first:]


def take(path: str | os.PathLike[str], device: int, seam: Seam) -> _core.Engine | None:
    """The engine that was preloaded for this plan, which is then the caller's; None if there is none."""
    key = _Key(os.path.realpath(path), device, seam)
    with _lock:
        kept = _kept.pop(key, None)
        if kept is None:
            others = [k for k in _kept if k[:2] == key[:2]]
            for other in others:
                _log.warning('%s was preloaded for seam="%s" and is loaded again for seam="%s"', path, other.seam, seam)
                drop(other)
            return None
    if kept.version != _version(key.path):
        _log.warning("%s was replaced since it was preloaded, and is loaded again", path)
        kept.engine.close()
        return None
    return kept.engine


def borrow(path: str | os.PathLike[str], device: int, seam: Seam) -> _core.Engine | None:
    """The same, and it stays preloaded."""
    key = _Key(os.path.realpath(path), device, seam)
    with _lock:
        kept = _kept.get(key)
        return kept.engine if kept is not None and kept.version == _version(key.path) else None


def keep(path: str | os.PathLike[str], device: int, seam: Seam, engine: _core.Engine) -> None:
    """Puts an engine where `take` finds it."""
    with _lock:
        key = _Key(os.path.realpath(path), device, seam)
        drop(key)
        _kept[key] = _Kept(engine, _version(key.path))


def discard(path: str | os.PathLike[str], device: int, seam: Seam) -> bool:
    """Closes the engine that nobody asked for; False if there is none."""
    with _lock:
        key = _Key(os.path.realpath(path), device, seam)
        there = key in _kept
        drop(key)
        return there


def drop(key: _Key) -> None:
    kept = _kept.pop(key, None)
    if kept is not None:
        kept.engine.close()


def drop_all() -> None:
    """Closes what was preloaded and never asked for."""
    with _lock:
        for key in list(_kept):
            drop(key)


def open_core(path: str | os.PathLike[str], device: int) -> _core.Engine:
    """The core's engine for a wrapper, preloaded or new."""
    found = take(path, device, "wrapper")
    return found if found is not None else load_core(path, device, "wrapper")


#: How the core treats inputs, for each seam. Both copy what is strided. A wrapper casts, and its results are on the GPU
#: whatever its inputs are; `Engine` takes exactly its types.
POLICIES: dict[Seam, dict[str, Any]] = {
    "wrapper": {"on_strided": "copy", "on_dtype": "cast", "host": "error"},
    "engine": {"on_strided": "copy"},
}


def load_core(path: str | os.PathLike[str], device: int, seam: Seam, **options: Any) -> _core.Engine:
    """Loads an engine and records what that took."""
    before = available(device)
    with _lowest(device) as readings:
        engine = _core.Engine(path, device=device, **{"graphs": settings.graphs(), **POLICIES[seam], **options})
    after = available(device)
    report = engine.load_report
    load = Load(
        path=os.fspath(path),
        device=device,
        bytes=report["bytes"],
        seconds=report["seconds"],
        peak_host_bytes=report["peak_host_bytes"],
        device_free_before=before,
        device_free_lowest=min(before, after, *readings),
        device_free_after=after,
    )
    with _lock:
        _loads.append(load)
    _log.info(
        "loaded %s: %.2f GB in %.1f s, %.2f GB of device memory",
        load.path,
        load.bytes / 1e9,
        load.seconds,
        load.device_bytes / 1e9,
    )
    return engine


def available(device: int) -> int:
    """Bytes that an engine can get on this GPU."""
    import torch

    if _unified():
        free = platform.meminfo().get("MemAvailable")
        if free is not None:
            return free  # the driver's figure leaves out what the page cache would give back
    return int(torch.cuda.mem_get_info(device)[0])


@functools.cache
def _unified() -> bool:
    """Whether the GPU shares the system's memory."""
    return bool(platform.identify().integrated)


@contextlib.contextmanager
def _lowest(device: int) -> Iterator[list[int]]:
    """Reads the free memory now and then meanwhile; the list gets the lowest reading."""
    done = threading.Event()
    readings: list[int] = []

    def read() -> None:
        while not done.wait(0.005):
            readings[:] = [min([*readings, available(device)])]

    reader = threading.Thread(target=read, name="jetrt-groot-memory", daemon=True)
    reader.start()
    try:
        yield readings
    finally:
        done.set()
        reader.join()


def _wanted(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], device: int, seam: str) -> Iterator[_Key]:
    if seam not in ("auto", "wrapper", "engine"):
        raise ValueError(f"seam: found {seam!r}; allowed: 'auto', 'wrapper', 'engine'")
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        folder = Path(path).is_dir()
        for file in sorted(f for f in Path(path).iterdir() if f.suffix in fit.SUFFIXES) if folder else [Path(path)]:
            if not file.exists():
                raise FileNotFoundError(errno.ENOENT, "No such plan", str(file))
            kind: Seam = "engine" if seam == "engine" or (seam == "auto" and folder) else "wrapper"
            yield _Key(os.path.realpath(file), device, kind)


def _version(path: str) -> tuple[int, int, int]:
    stat = Path(path).stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
