"""The random numbers of the devices."""

from __future__ import annotations

from typing import Any

from .. import _random


def _of(device: Any) -> _random.Generator:
    from . import _index, init

    init()
    return _random.of_device(_index(device))


def get_rng_state(device: Any = "cuda") -> Any:
    from . import is_current_stream_capturing

    if is_current_stream_capturing():
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture.")
    return _of(device).get_state()


def set_rng_state(new_state: Any, device: Any = "cuda") -> None:
    _of(device).set_state(new_state)


def get_rng_state_all() -> list[Any]:
    from . import device_count

    return [get_rng_state(i) for i in range(device_count())]


def manual_seed(seed: int) -> None:
    _of(None).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    _random.manual_seed_cuda(seed)


def initial_seed() -> int:
    return _of(None).initial_seed()
