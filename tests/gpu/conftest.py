"""Fixtures of the tests that need a GPU, its driver, TensorRT and the folder of test engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# JAX would take most of the GPU's memory at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

HERE = Path(__file__).parent
PLANS = ("dit5.engine", "mlp.engine", "conv_fp16.engine", "nonzero.engine")


def missing() -> str | None:
    """Why these tests cannot run here, or None."""
    folder = os.environ.get("JETRT_TEST_ENGINES")
    if not folder:
        return "JETRT_TEST_ENGINES does not name the folder of test engines"
    absent = [name for name in PLANS if not (Path(folder) / name).is_file()]
    if absent:
        return f"{', '.join(absent)}: not in the folder that JETRT_TEST_ENGINES names"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no GPU"
    import jetrt

    try:
        jetrt.library_info()
    except jetrt.errors.JetrtError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    # Only where they are wanted: asking costs an import of torch.
    reason = missing() if ours and os.environ.get("JETRT_TEST_ENGINES") else "JETRT_TEST_ENGINES is not set"
    for item in ours:
        item.add_marker(pytest.mark.filterwarnings("default"))  # array libraries warn as they like
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def engines() -> Path:
    return Path(os.environ["JETRT_TEST_ENGINES"])


@pytest.fixture
def load(engines: Path) -> Iterator[Callable[..., Any]]:
    """`load("mlp", graphs="off")`: an engine that is closed after the test."""
    import jetrt

    loaded = []

    def open_engine(name: str, **options: Any) -> Any:
        engine = jetrt.Engine(engines / f"{name}.engine", **options)
        loaded.append(engine)
        return engine

    yield open_engine
    for engine in loaded:
        engine.close()


@pytest.fixture(autouse=True)
def gpu_is_healthy() -> Iterator[None]:
    """A kernel that faulted must fail the test that launched it, not the next one."""
    import torch

    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()
