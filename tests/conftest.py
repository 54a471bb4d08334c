"""Runs the tests on the stand-in libraries for CUDA and TensorRT (`tests/fakes.py`), except `pytest -m gpu`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# The tests build in the dev profile on purpose; a process that they start must not warn either.
os.environ["JETRT_ALLOW_DEBUG"] = "1"

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    selected = config.getoption("markexpr")
    if "gpu" in selected and "not gpu" not in selected:
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
