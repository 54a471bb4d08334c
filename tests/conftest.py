"""Runs the tests on the stand-in libraries for CUDA and TensorRT (`tests/fakes.py`), except `pytest -m gpu`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

# The tests build in the dev profile on purpose; a process that they start must not warn either.
os.environ["JETRT_ALLOW_DEBUG"] = "1"

sys.path.insert(0, str(Path(__file__).parent))


def on_gpu(config: pytest.Config) -> bool:
    selected = config.getoption("markexpr")
    return "gpu" in selected and "not gpu" not in selected


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Not even imported: torch would ask the stand-in driver for its GPUs, and modules of one name stand in both.
    if collection_path.parent == Path(__file__).parent and (collection_path.name == "gpu") != on_gpu(config):
        return True
    # They run on the stand-in torch, and jetrt remembers the first torch that it met in a process.
    drop_in = Path(__file__).parent / "drop_in"
    if collection_path == drop_in and not any(drop_in in (p, *p.parents) for p in named(config)):
        return True
    return None


def named(config: pytest.Config) -> list[Path]:
    """Files and folders of the command line."""
    return [Path(word.split("::")[0]).resolve() for word in config.args]


def pytest_configure(config: pytest.Config) -> None:
    if on_gpu(config):
        return  # the real libraries are wanted
    try:
        import fakes
    except ImportError as error:
        raise pytest.UsageError(
            f"tests/fakes.py, which provides the stand-in libraries, is missing: {error}"
        ) from error
    # It may start this process again under another environment. pytest captures nothing at this point (it does while
    # it imports conftest.py), so that the new process writes where this one would.
    fakes.ensure_environment()


@pytest.fixture
def onnx_models() -> Any:
    import onnx_models  # skips where there is no onnxruntime

    return onnx_models


@pytest.fixture
def add(tmp_path: Path, onnx_models: Any) -> Path:
    """An ONNX file that adds."""
    return onnx_models.add(tmp_path / "add.onnx")
