"""What only a process of its own can tell: imports that may crash, and what CUDA says about the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..errors import JetrtError

if TYPE_CHECKING:
    from ..environment import Environment
    from ..provenance import Machine

__all__ = ["ChildError", "imports", "machine"]

#: Package -> the module to import.
_MODULES: Final = {
    "opencv-python": "cv2",
    "opencv-python-headless": "cv2",
    "opencv-contrib-python": "cv2",
    "opencv (no metadata)": "cv2",
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "pycuda": "pycuda.driver",
    "onnx": "onnx",
    "scipy": "scipy.linalg",
}
_MACHINE: Final = """
import dataclasses, json
from jetrt.provenance import Machine
print(json.dumps(dataclasses.asdict(Machine.here())))
"""


class ChildError(JetrtError):
    """A child process failed; the message is its last line."""


def machine(timeout: float = 30) -> Machine:
    """The machine as CUDA and TensorRT see it. Raises `ChildError`."""
    from ..provenance import Machine

    return Machine(**json.loads(_output([sys.executable, "-c", _MACHINE], timeout)))


def imports(environment: Environment, timeout: float = 60) -> dict[str, str]:
    """Imports each heavy package that is installed in a process of its own."""
    found: dict[str, str] = {}
    for module in dict.fromkeys(m for package, m in _MODULES.items() if package in environment.packages):
        found[module] = _import(module, timeout)
    return found


def _import(module: str, timeout: float) -> str:
    try:
        # numpy tells of a module for another numpy on stderr, and the import may succeed all the same.
        told = _run([sys.executable, "-c", f"import {module}"], timeout)
    except ChildError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"`import {module}` took longer than {timeout:.0f} s"
    if "compiled using NumPy 1" in told.stderr or "_ARRAY_API not found" in told.stderr:
        return "it was compiled for numpy 1 and this is numpy 2"
    return "" if told.returncode == 0 else _last(told)


def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise ChildError(str(error)) from error


def _last(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:400] if lines else f"exit status {done.returncode}"


def _output(command: Sequence[str], timeout: float) -> str:
    try:
        done = _run(command, timeout)
    except subprocess.TimeoutExpired:
        raise ChildError(f"it took longer than {timeout:.0f} s") from None
    if done.returncode:
        raise ChildError(_last(done))
    return done.stdout
