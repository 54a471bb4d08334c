"""What tests look at and steer: counters, faults on request, and a reset. Real torch has nothing of this.

`counts`: tensors made by the allocator (`allocations`), memory asked of the driver (`driver_allocations`), fills of new
memory and of old (`fills`), waits of the host for the device (`waits`), copies between host and device or of a layout
(`copies`), kernels put on a stream (`kernels`), graphs launched (`replays`).
`fail(name, n, error)`: the n-th call from now of the operator of that name ("empty", "randn", "cat", "add", …) raises.
"""

from __future__ import annotations

import collections
from typing import Any

counts: collections.Counter[str] = collections.Counter()
_faults: dict[str, list[Any]] = {}

# Memory that torch's allocator takes back is filled with 0xDB, in the order of its stream.
poison = True


def fail(name: str, n: int = 1, error: BaseException | None = None) -> None:
    """The n-th call of this operator from now raises; n=0 takes it back."""
    if n == 0:
        _faults.pop(name, None)
    else:
        _faults[name] = [n, error or RuntimeError(f"{name}: failed on request")]


def reached(name: str) -> None:
    fault = _faults.get(name)
    if fault is None:
        return
    fault[0] -= 1
    if fault[0] <= 0:
        del _faults[name]
        raise fault[1]


def reset() -> None:
    """Forgets counts and faults, waits for all streams, and gives memory that no tensor holds back to the driver.
    Modes, seeds and the current streams of this thread are as at the start."""
    import gc

    from . import _memory, _modes, _random, cuda

    gc.collect()
    counts.clear()
    _faults.clear()
    _modes.reset()
    if cuda.is_initialized():
        cuda.streams.reset()
        _memory.release_all()
        _random.reset()
    counts.clear()
