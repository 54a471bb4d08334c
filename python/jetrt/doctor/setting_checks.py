"""Environment variables that do nothing, or something else than was meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .facts import Facts
from .finding import Finding


def disable_myelin(facts: Facts) -> Iterator[Finding]:
    if "TRT_DISABLE_MYELIN" in facts.environ:
        yield Finding(
            "trt-disable-myelin",
            "warning",
            f"TRT_DISABLE_MYELIN is set to {facts.environ['TRT_DISABLE_MYELIN']!r}",
            "TensorRT does not know this variable: Myelin stays on, and whoever set it believes otherwise. What avoids "
            "its failing kernels is a lower optimisation level",
            ("unset TRT_DISABLE_MYELIN", "jetrt build --onnx MODEL.onnx --engine MODEL.engine --opt-level auto"),
        )


def expandable_segments(facts: Facts) -> Iterator[Finding]:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = facts.environ.get(name, "")
        if facts.environment.tegra and re.search(r"expandable_segments:\s*true", value, re.I):
            kept = ",".join(part for part in value.split(",") if "expandable_segments" not in part)
            yield Finding(
                "expandable-segments",
                "warning",
                f"{name} asks for expandable_segments, and this is a Jetson",
                "some Jetson releases accept it and fail at the first allocation (`CUDA driver error`). "
                "`jetrt.configure_torch_memory()` tries it in a process of its own before it sets it",
                (f"export {name}={kept}" if kept else f"unset {name}",),
            )


def visible_devices(facts: Facts) -> Iterator[Finding]:
    value = facts.environ.get("CUDA_VISIBLE_DEVICES")
    if facts.environment.gpus and value is not None and value.strip() in ("", "-1", "NoDevFiles"):
        yield Finding(
            "no-visible-devices",
            "error",
            f"CUDA_VISIBLE_DEVICES is {value!r}, which hides every GPU",
            "nothing that is started from this shell finds a GPU",
            ("unset CUDA_VISIBLE_DEVICES",),
        )


def launch_blocking(facts: Facts) -> Iterator[Finding]:
    if facts.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield Finding(
            "launch-blocking",
            "warning",
            "CUDA_LAUNCH_BLOCKING is set",
            "every launch waits for its kernel, which finds errors and makes everything slow",
            ("unset CUDA_LAUNCH_BLOCKING",),
        )


def tensorrt_path(facts: Facts) -> Iterator[Finding]:
    value = facts.environ.get("JETRT_TENSORRT_PATH", "")
    if value and not any(
        lib.name == "nvinfer" and lib.found_by == "JETRT_TENSORRT_PATH" for lib in facts.environment.libraries
    ):
        state = "does not exist" if not Path(value).exists() else "has no libnvinfer.so.10 or libnvinfer.so.11"
        yield Finding(
            "tensorrt-path",
            "error",
            f"JETRT_TENSORRT_PATH is {value!r}, which {state}",
            "jetrt searches nowhere else while it is set",
            ("unset JETRT_TENSORRT_PATH",),
        )


def debug_build(facts: Facts) -> Iterator[Finding]:
    profile = facts.environment.jetrt.get("profile")
    if profile != "release":
        yield Finding(
            "debug-build",
            "warning",
            f"this jetrt is a {profile} build",
            "a call takes several times as long on the host",
            ("maturin develop --release",),
        )


CHECKS: Final = (disable_myelin, expandable_segments, visible_devices, launch_blocking, tensorrt_path, debug_build)
