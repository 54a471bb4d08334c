"""A stand-in for torch: pure Python over the stand-in CUDA driver (see fakes/README.md), for tests without a GPU.

It has what jetrt's drop-ins and their tests need, with torch's names, rules and messages, and nothing else: what is not
here fails by AttributeError or NotImplementedError. Gradients are a flag. `torch._standin` is what tests look at.
"""

# ruff: noqa: F401, F403 - what is imported here are torch's names
from __future__ import annotations

import builtins

from . import _standin, cuda, nn, utils, version
from ._driver import AcceleratorError
from ._dtypes import (
    Size,
    bfloat16,
    complex64,
    device,
    dtype,
    finfo,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    float64,
    iinfo,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
)
from ._dtypes import bool_ as bool
from ._functions import *
from ._memory import OutOfMemoryError
from ._modes import (
    are_deterministic_algorithms_enabled,
    enable_grad,
    inference_mode,
    is_deterministic_algorithms_warn_only_enabled,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_grad_enabled,
    use_deterministic_algorithms,
)
from ._random import Generator, default_generator, manual_seed
from ._tensor import Tensor
from .version import __version__

float = float32
double = float64
half = float16
int = int32
long = int64
short = int16
strided = "torch.strided"
contiguous_format = "torch.contiguous_format"
preserve_format = "torch.preserve_format"


def get_rng_state() -> Tensor:
    return default_generator.get_state()


def set_rng_state(new_state: Tensor) -> None:
    default_generator.set_state(new_state)


def initial_seed() -> int:
    return default_generator.initial_seed()


def is_autocast_enabled(device_type: str = "cuda") -> builtins.bool:  # noqa: ARG001 - torch's signature
    """There is no autocast here, so it is never on."""
    return False


def is_inference(t: Tensor) -> bool:
    return t.is_inference()


from_dlpack = utils.dlpack.from_dlpack
