"""Does a set of engines fit into the memory? The arithmetic of `jetrt plan`, and of everything that loads a set.

What an engine takes on the GPU is

* its plan: weights and kernels, which is known from the file's size;
* scratch memory for each execution context, which a manifest may record. It grows with shapes and not with weights, so
  that nothing else tells it: without a record a quarter of the plan is taken for it, at least 64 MiB, and the figure is
  called *estimated*;
* inputs and outputs, known from a manifest as far as shapes are, at the largest profile.

A set whose certain part exceeds the budget does not fit and is refused before a byte of it is read. One that exceeds it
by an estimate alone may not fit: `jetrt plan` says so, and a load goes on and counts what the engines really took.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from . import _core, platform
from .errors import CudaError, LibraryNotFoundError, OutOfMemoryError
from .report import size, table

if TYPE_CHECKING:
    from .provenance import Manifest

__all__ = [
    "SCHEMA",
    "SUFFIXES",
    "Budget",
    "Fit",
    "GpuMemory",
    "Need",
    "check",
    "gpu_memory",
    "load_engines",
    "machine_budget",
    "needs",
    "plans_of",
    "refuse",
    "stated_budget",
]

SCHEMA: Final = "jetrt-fit-1"
#: Of plans, as scripts name them.
SUFFIXES: Final = (".engine", ".trt", ".plan")
MIB: Final = 1 << 20
ESTIMATE: Final = (
    "estimated: nothing recorded TensorRT's scratch memory for this plan; a quarter of the plan, at least 64 MiB, is "
    "taken for it. It grows with the shapes and may be many times that: `jetrt inspect` shows the true figure once the "
    "plan is loaded."
)

_log = logging.getLogger("jetrt.fit")


# ------------------------------------------------------------------------------------------------ what an engine needs


@dataclass(frozen=True)
class Need:
    """What one engine takes of the GPU's memory, in bytes; ``None`` is unknown."""

    path: str
    plan: int
    #: Weights that a stripped plan gets from its model.
    weights: int = 0
    #: Scratch memory of all its contexts, where it was recorded.
    scratch: int | None = None
    #: Inputs and outputs of the largest profile, as far as their shapes are known.
    tensors: int | None = None
    contexts: int = 1

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def certain(self) -> int:
        """At least this much is taken by loading it."""
        return self.plan + self.weights + (self.scratch or 0)

    @property
    def estimated(self) -> bool:
        return self.scratch is None

    @property
    def likely(self) -> int:
        """What it takes once it runs, with the estimate for what is not recorded."""
        scratch = self.contexts * max(self.plan // 4, 64 * MIB) if self.scratch is None else self.scratch
        return self.plan + self.weights + scratch + (self.tensors or 0)


def plans_of(paths: Any) -> list[Path]:
    """The plans behind these paths, each once; a folder stands for the plans in it.

    Raises FileNotFoundError for what is not there, and for a folder without plans."""
    found: dict[str, Path] = {}
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        folder = Path(path)
        if folder.is_dir():
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.is_dir())
            if not files:
                names = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
                raise FileNotFoundError(errno.ENOENT, f"the folder has no plan; allowed: {names}", str(folder))
        else:
            files = [folder]
        for file in files:
            if not file.exists():
                raise FileNotFoundError(errno.ENOENT, "No such plan", str(file))
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def needs(paths: Any, *, contexts: int = 1) -> list[Need]:
    """What each plan takes, the largest first. Files' sizes and manifests are read, of the plans nothing.

    Raises FileNotFoundError, and `ManifestError` for a manifest that is damaged."""
    found = [_need(path, contexts) for path in plans_of(paths)]
    return sorted(found, key=lambda need: (-need.likely, need.path))


def _need(path: Path, contexts: int) -> Need:
    from .provenance import Manifest

    plan = path.stat().st_size
    manifest = Manifest.read(path)
    if manifest is None:
        return Need(str(path), plan, contexts=contexts)
    scratch = _recorded_scratch(manifest)
    return Need(
        str(path),
        plan,
        weights=_weights(path, manifest),
        scratch=None if scratch is None else scratch * contexts,
        tensors=_tensors(manifest),
        contexts=contexts,
    )


def _recorded_scratch(manifest: Manifest) -> int | None:
    """Of one context: an entry of the build's findings, ``{"kind": "memory", "context_bytes": …}``."""
    for entry in manifest.build.findings if manifest.build else ():
        if isinstance(entry, Mapping) and entry.get("kind") == "memory":
            value = entry.get("context_bytes")
            if type(value) is int and value >= 0:
                return value
    return None


def _weights(path: Path, manifest: Manifest) -> int:
    if not manifest.stripped or manifest.model is None:
        return 0
    beside = path.with_name(manifest.model.file)
    whole = beside.stat().st_size if beside.is_file() else 0
    return whole + sum(file.bytes for file in manifest.model.files)


#: Bytes of one element; "int4" and the like are packed.
_WIDTHS: Final = {
    **dict.fromkeys(("float64", "int64", "uint64"), 8.0),
    **dict.fromkeys(("float32", "int32", "uint32"), 4.0),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2.0),
    **dict.fromkeys(("int4", "uint4", "float4"), 0.5),
}


def _tensors(manifest: Manifest) -> int:
    """Those whose shape is known: inputs at the largest profile, outputs without dynamic dimensions."""
    total = 0.0
    for tensor in (*manifest.inputs, *manifest.outputs):
        if tensor.location == "device":
            shapes = [tensor.shape, *_largest_shapes(manifest, tensor.name)]
            known = [math.prod(shape) for shape in shapes if all(dim >= 0 for dim in shape)]
            total += max(known, default=0) * _WIDTHS.get(tensor.dtype, 1.0)
    return int(total)


def _largest_shapes(manifest: Manifest, name: str) -> Iterator[tuple[int, ...]]:
    for profile in manifest.profiles:
        try:
            yield tuple(int(dim) for dim in profile["shapes"][name]["max"])
        except (KeyError, TypeError, ValueError):
            continue  # a profile that says nothing about it


# ------------------------------------------------------------------------------------------------ what there is of it


@dataclass(frozen=True)
class GpuMemory:
    """Bytes that engines can get, and all there are."""

    free: int
    total: int
    #: The GPU shares the system's memory.
    unified: bool


@dataclass(frozen=True)
class Budget:
    """What engines may take, as a sum: (what, bytes), the first one being what there is."""

    terms: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return max(sum(count for _, count in self.terms), 0)


def gpu_memory(device: int = 0) -> GpuMemory:
    """Asks the driver, and on unified memory the kernel, since the driver's figure leaves out what the page cache would
    give back. On a discrete GPU this makes a CUDA context for a moment, so that what a context takes is counted.

    Raises `LibraryNotFoundError` and `CudaError`."""
    with _reader(device) as read:
        return read()


@contextlib.contextmanager
def _reader(device: int) -> Iterator[Callable[[], GpuMemory]]:
    """A function that reads the memory; the context is kept meanwhile."""
    here = platform.identify()
    if here.integrated and here.memory_available is not None and here.memory_total is not None:
        yield _system_memory
        return
    driver = _driver()
    _call(driver, "cuInit", 0)
    handle = ctypes.c_int()
    _call(driver, "cuDeviceGet", ctypes.byref(handle), device)
    shared = ctypes.c_int()
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(shared), 18, handle)  # CU_DEVICE_ATTRIBUTE_INTEGRATED
    if shared.value and here.memory_available is not None:
        yield _system_memory
        return
    context = ctypes.c_void_p()
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)

    def read() -> GpuMemory:
        _call(driver, "cuCtxPushCurrent_v2", context)
        try:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            _call(driver, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        return GpuMemory(free.value, total.value, unified=False)

    try:
        yield read
    finally:
        _call(driver, "cuDevicePrimaryCtxRelease_v2", handle)


def _system_memory() -> GpuMemory:
    memory = platform.meminfo()
    return GpuMemory(memory.get("MemAvailable", 0), memory.get("MemTotal", 0), unified=True)


def _driver() -> Any:
    folders = ("", "/usr/lib/aarch64-linux-gnu/nvidia/", "/usr/lib/aarch64-linux-gnu/tegra/")
    problems = []
    for folder in folders:
        try:
            return ctypes.CDLL(f"{folder}libcuda.so.1")
        except OSError as error:
            problems.append(str(error))
    raise LibraryNotFoundError(
        f"the GPU's memory cannot be read: libcuda.so.1 cannot be opened ({problems[0]}). Install the NVIDIA driver, "
        "or state a budget.",
        library="libcuda.so.1",
        searched=problems,
    )


def _call(driver: Any, name: str, *arguments: Any) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        raise CudaError(
            f"the GPU's memory cannot be read: {name} failed with CUDA error {code}. `jetrt doctor` looks for the "
            "cause; or state a budget.",
            call=name,
            code=code,
        )


def machine_budget(
    memory: GpuMemory, *, reserve: int | None = None, torch_fraction: float | None = None, torch_has: int = 0
) -> Budget:
    """What engines may take of this memory.

    reserve: bytes that stay free for the system; None: on unified memory a twentieth of it, at least 512 MiB, else
        none. torch_fraction: the share of all memory that torch may take (`set_per_process_memory_fraction`).
    torch_has: bytes that it took already, which are not free any more."""
    if reserve is None:
        reserve = max(memory.total // 20, 512 * MIB) if memory.unified else 0
    what = "available to programs (MemAvailable)" if memory.unified else "free on the GPU"
    terms = [(what, memory.free)]
    if reserve:
        terms.append(("reserve for the system", -reserve))
    return Budget((*terms, *_torch_share(torch_fraction, memory.total, "the GPU's memory", torch_has)))


def stated_budget(count: int, *, reserve: int | None = None, torch_fraction: float | None = None) -> Budget:
    """A budget that somebody states; torch's share is of this budget."""
    terms = [("budget", count)]
    if reserve:
        terms.append(("reserve for the system", -reserve))
    return Budget((*terms, *_torch_share(torch_fraction, count, "the budget")))


def _torch_share(fraction: float | None, total: int, of: str, has: int = 0) -> list[tuple[str, int]]:
    if fraction is None:
        return []
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"torch_fraction: found {fraction!r}; allowed: a number above 0 and up to 1")
    less = f" less {size(has)} that it has" if has else ""
    return [(f"torch, {fraction:.0%} of {of} ({size(total)}){less}", -max(int(fraction * total) - has, 0))]


# ---------------------------------------------------------------------------------------------------------- the check


@dataclass(frozen=True)
class Fit:
    """Whether engines fit into a budget, with the arithmetic."""

    #: In the order in which they are loaded: the largest first, while the memory is whole.
    needs: tuple[Need, ...]
    budget: Budget

    @property
    def certain(self) -> int:
        return sum(need.certain for need in self.needs)

    @property
    def likely(self) -> int:
        return sum(need.likely for need in self.needs)

    @property
    def verdict(self) -> Literal["fits", "may not fit", "does not fit"]:
        """May not: what is certain fits, and it exceeds the budget with what the engines take when they run."""
        if self.certain > self.budget.bytes:
            return "does not fit"
        return "fits" if self.likely <= self.budget.bytes else "may not fit"

    def to_mapping(self) -> dict[str, Any]:
        rows = [{**asdict(n), "certain": n.certain, "likely": n.likely, "estimated": n.estimated} for n in self.needs]
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "budget": self.budget.bytes,
            "budget_terms": [list(term) for term in self.budget.terms],
            "certain": self.certain,
            "likely": self.likely,
            "engines": rows,
        }

    def text(self) -> str:
        rows = [
            [
                need.name,
                size(need.plan),
                size(need.weights) if need.weights else "",
                size(need.likely - need.plan - need.weights - (need.tensors or 0)),
                size(need.tensors),
                size(need.likely),
                "estimated" if need.estimated else "manifest",
            ]
            for need in self.needs
        ]
        header = ["load order", "plan", "refit", "scratch", "inputs, outputs", "together", "by"]
        if not any(need.weights for need in self.needs):
            rows, header = [row[:2] + row[3:] for row in rows], header[:2] + header[3:]
        parts = [table(header, rows), self._sum()]
        if any(need.estimated for need in self.needs):
            parts.append(ESTIMATE)
        return "\n\n".join([*parts, self._conclusion()])

    def _sum(self) -> str:
        left, rows = 0, []
        for i, (what, count) in enumerate(self.budget.terms):
            left += count
            rows.append([("" if not i else "- " if count < 0 else "+ ") + what, size(abs(count)), size(left)])
        for need in self.needs:
            left -= need.likely
            rows.append([f"- {need.name}", size(need.likely), size(left)])
        return table(["", "", "left"], rows)

    def _conclusion(self) -> str:
        limit = f"{size(self.budget.bytes)} for engines"
        if self.verdict == "fits":
            sure = "should fit, by estimates" if any(need.estimated for need in self.needs) else "fits"
            return f"It {sure}: {size(self.likely)} of {limit}."
        if self.verdict == "may not fit":
            return (
                f"It may not fit: the plans alone take {size(self.certain)}, with what they need to run "
                f"{size(self.likely)}, of {limit}. Loading stops as soon as the rest no longer fits."
            )
        return (
            f"It does not fit: at least {size(self.certain)} of {limit}. Leave one engine to torch, build smaller ones "
            "(a lower precision, weight streaming), or free memory first."
        )


def check(engines: Iterable[Need], budget: Budget) -> Fit:
    """Pure arithmetic; the largest first."""
    return Fit(tuple(sorted(engines, key=lambda need: (-need.likely, need.path))), budget)


def refuse(rest: Sequence[Need], used: int, allowed: int, limit: str) -> None:
    """Raises `OutOfMemoryError` unless what is used and what is certain of the rest fit; `limit` says what allows
    how much."""
    certain = sum(need.certain for need in rest)
    if used + certain <= allowed:
        return
    parts = [f"{size(used)} taken by those loaded so far"] if used else []
    parts += [f"{need.name} {size(need.certain)}" for need in rest]
    state = "All that were loaded are closed again." if used else "Nothing was read."
    raise OutOfMemoryError(
        f"these engines do not fit: {' + '.join(parts)} = {size(used + certain)}; {limit} (a plan takes at least its "
        f"own size on the GPU). {state} Leave one engine to torch, build smaller ones, or free memory first.",
        requested=used + certain,
        free=allowed,
    )


# ------------------------------------------------------------------------------------------------------------- loading


def load_engines(
    paths: Any,
    memory_budget: int | str | None = None,
    *,
    device: int = 0,
    torch_fraction: float | None = None,
    **options: Any,
) -> dict[str, _core.Engine]:
    """Loads a set of engines, the largest first, or none of them.

        engines = jetrt.load_engines(["backbone.engine", "dit.engine"], memory_budget="6G")
        engines["dit.engine"](x=array)

    paths: plans; a folder stands for the plans in it. A plan that is named twice is loaded once.
    memory_budget: device memory that they may take, in bytes or as "6G"; None: what is there now, on unified memory
        less a reserve for the system.
    device: GPU ordinal. torch_fraction: share of the memory that torch may take and engines must leave.
    options: those of `jetrt.Engine`, for all of them.

    A set of which more is certain than the budget has is refused before a byte of a plan is read. What the engines take
    beyond that is known when each has been loaded: then the rest must still fit, or all are closed again.

    Returns path, as it was given -> engine, in the order of loading. Raises `OutOfMemoryError` with the arithmetic,
    FileNotFoundError, and what loading an engine raises.
    """
    stated = None if memory_budget is None else read_size(memory_budget, "memory_budget")
    order = needs(paths, contexts=int(options.get("max_contexts", 1)))
    engines: dict[str, _core.Engine] = {}
    with _reader(device) as read:
        start = read()
        allowed, limit = allowance(start, stated, torch_fraction=torch_fraction, torch_has=_torch_has(device))
        refuse(order, 0, allowed, limit)
        fit = check(order, Budget((("", allowed),)))
        if fit.verdict == "may not fit":
            _log.warning("%s %s", fit._conclusion(), limit)
        try:
            for index, need in enumerate(order):
                engines[need.path] = _core.Engine(need.path, device=device, **options)
                refuse(order[index + 1 :], max(start.free - read().free, 0), allowed, limit)
        except BaseException:
            for engine in engines.values():
                engine.close()
            raise
    return engines


def _torch_has(device: int) -> int:
    """Bytes that torch's allocator holds of this GPU, in this process."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.memory_reserved(device)) if torch is not None and torch.cuda.is_initialized() else 0


def allowance(
    memory: GpuMemory, stated: int | None, *, torch_fraction: float | None = None, torch_has: int = 0
) -> tuple[int, str]:
    """Bytes that engines may take of this memory, and the words for it. A stated budget needs no reserve, and is never
    more than what is there."""
    if stated is None:
        budget = machine_budget(memory, torch_fraction=torch_fraction, torch_has=torch_has)
        words = f"{size(memory.free)} are free"
        if len(budget.terms) > 1:
            words += "".join(f" - {size(-count)} {what}" for what, count in budget.terms[1:])
        return budget.bytes, words
    budget = stated_budget(stated, torch_fraction=torch_fraction)
    words = f"memory_budget is {size(stated)}"
    words += "".join(f" - {size(-count)} {what}" for what, count in budget.terms[1:])
    return min(budget.bytes, memory.free), f"{words}, and {size(memory.free)} are free"


def read_size(value: int | str, name: str) -> int:
    """Bytes, or a size such as "6G". Raises ValueError that names the argument."""
    from .builder.kinds import SIZE

    try:
        return int(SIZE.read(value))
    except ValueError as error:
        raise ValueError(f"{name}: found {value!r}; allowed: bytes, or {error}") from None
