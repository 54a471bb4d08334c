"""pytest plugin: tests that need a GPU or a runtime are skipped with the reason where there is none, and engines close.

    @pytest.mark.jetrt_gpu(min_sm=87, tensorrt="10.7", memory="8G")
    def test_speed(jetrt_engine): ...

    @pytest.mark.jetrt_runtime("pytorch_fp16")
    def test_torch(): ...

    def test_no_copies(jetrt_engine):
        engine = jetrt_engine("m.engine")

`assert_no_copies`, `assert_no_alloc` and `assert_close` are in `jetrt.testing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Everything of jetrt is imported when a test asks for it: this module is loaded by every run of pytest.

__all__ = ["jetrt_engine", "jetrt_machine"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "jetrt_gpu(min_sm=None, tensorrt=None, memory=None): needs a GPU and TensorRT; SM, version and memory at least",
    )
    config.addinivalue_line("markers", "jetrt_runtime(name): needs this runtime of jetrt")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("jetrt_gpu"):
        reason = _gpu_missing(*marker.args, **marker.kwargs)
        if reason:
            pytest.skip(reason)
    for marker in item.iter_markers("jetrt_runtime"):
        reason = _runtime_missing(*marker.args, **marker.kwargs)
        if reason:
            pytest.skip(reason)


@functools.cache
def _machine() -> Any:
    """The machine, or why there is none."""
    from .errors import JetrtError
    from .provenance import Machine

    try:
        return Machine.here()
    except (JetrtError, OSError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _gpu_missing(min_sm: int | None = None, tensorrt: str | None = None, memory: int | str | None = None) -> str:
    from .fit import read_size

    machine = _machine()
    if isinstance(machine, str):
        return f"needs a GPU with TensorRT: {machine}"
    if min_sm is not None and machine.sm < min_sm:
        return f"needs SM {min_sm} or newer: {machine.gpu} has {machine.sm}"
    if tensorrt is not None and _numbers(machine.tensorrt) < _numbers(tensorrt):
        return f"needs TensorRT {tensorrt} or newer: here is {machine.tensorrt}"
    if memory is not None and machine.memory_bytes < read_size(memory, "memory"):
        return f"needs {memory} of GPU memory: {machine.gpu} has {machine.memory_bytes >> 20} MiB"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _runtime_missing(name: str) -> str:
    from .errors import RuntimeNotAvailableError
    from .runtime import get_runtime

    try:
        get_runtime(name)
    except RuntimeNotAvailableError as error:
        return f"needs the runtime {name}: {str(error).splitlines()[0]}"
    return ""


@pytest.fixture
def jetrt_machine() -> Any:
    """The machine as CUDA and TensorRT see it (`jetrt.provenance.Machine`); skips where there is none."""
    machine = _machine()
    if isinstance(machine, str):
        pytest.skip(f"needs a GPU with TensorRT: {machine}")
    return machine


@pytest.fixture
def jetrt_engine(jetrt_machine: Any) -> Iterator[Callable[..., Any]]:  # noqa: ARG001 -- it skips
    """A function that loads an engine, with the arguments of `jetrt.Engine`; all are closed after the test. Skips where
    there is no GPU."""
    import jetrt

    opened: list[Any] = []

    def load(path: Any, **options: Any) -> Any:
        opened.append(jetrt.Engine(path, **options))
        return opened[-1]

    yield load
    for engine in reversed(opened):
        engine.close()
