"""Assertions for tests of engines: nothing was copied, nothing was allocated, and the outputs are those of a reference.

The fixtures and markers of the pytest plugin are in `jetrt.pytest_plugin`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["assert_close", "assert_no_alloc", "assert_no_copies"]

_COPIES: Final = ("strided_copies", "casts", "host_to_device_bytes", "device_to_host_bytes", "host_to_host_bytes")
_ALLOCATIONS: Final = ("output_allocations", "staging_allocations")


@contextlib.contextmanager
def assert_no_copies(*engines: Any) -> Iterator[None]:
    """Fails if an engine copied or cast anything meanwhile, or was not called at all.

        with assert_no_copies(engine):
            engine(x=tensor)

    Raises AssertionError that names the counters of `Engine.stats` that grew."""
    with _counters_stand(engines, _COPIES, "copied"):
        yield


@contextlib.contextmanager
def assert_no_alloc(*engines: Any) -> Iterator[None]:
    """Fails if an engine allocated a buffer meanwhile, in device or page-locked memory, or was not called at all.

    Use each shape before, with `Engine.prepare` or some calls: the first calls of a shape allocate, and so does the one
    that captures its graph. Allocations of all of jetrt in this process are counted beside those of the engines."""
    from ._core import library_info

    def process() -> dict[str, int]:
        info = library_info()
        return {name: int(info[name]) for name in ("device_allocations", "host_allocations")}

    before = process()
    with _counters_stand(engines, _ALLOCATIONS, "allocated"):
        yield
    after = process()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    if grown:
        raise AssertionError(f"jetrt allocated in this process: {_listed(grown)}")


@contextlib.contextmanager
def _counters_stand(engines: tuple[Any, ...], names: tuple[str, ...], did: str) -> Iterator[None]:
    if not engines:
        raise TypeError("give the engines that are called inside")
    before = [dict(engine.stats) for engine in engines]
    yield
    for engine, old in zip(engines, before, strict=True):
        new = engine.stats
        if new["calls"] == old["calls"]:
            raise AssertionError(f"{engine.name} was not called, so that nothing is shown")
        grown = {name: new[name] - old[name] for name in names if new[name] != old[name]}
        if grown:
            raise AssertionError(f"{engine.name} {did}: {_listed(grown)} (in {new['calls'] - old['calls']} calls)")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:+}" for name, count in counts.items())


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], precision: str = "fp32", **limits: Any) -> None:
    """Fails unless every output is as close to the reference as the parity gate of `jetrt build` demands.

    found, expected: output name -> array; what is on the GPU is copied.
    precision: "fp32", "tf32", "fp16", "bf16", "int8", "fp8" or "mixed"; its limits apply.
    limits: changes to them for every output: cosine, max_rel, max_abs, mean_abs, to_peak, absolute, differing.

    Raises AssertionError with one line for each output that differs."""
    from dataclasses import replace

    from .builder.comparison import compare
    from .builder.thresholds import Thresholds

    thresholds = Thresholds.of(precision)
    thresholds = replace(thresholds, default=replace(thresholds.default, **limits))
    results = compare(_arrays(found), _arrays(expected), thresholds)
    failed = [result for result in results if not result.passed]
    if failed:
        lines = [f"{result.output}: {'; '.join(result.reasons)}" for result in failed]
        raise AssertionError("\n".join([f"{len(failed)} of {len(results)} outputs differ ({precision}):", *lines]))
    if not results:
        raise AssertionError("there are no outputs, so that nothing is compared")


def _arrays(values: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    def array(value: Any) -> Any:
        if hasattr(value, "detach"):  # a torch tensor; numpy has no bfloat16
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        elif hasattr(value, "get") and hasattr(value, "device"):  # CuPy
            value = value.get()
        return np.asarray(value)

    return {name: array(value) for name, value in values.items()}
