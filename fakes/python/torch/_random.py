"""Random numbers: a seed and an offset per device, as torch's Philox generators have; each call moves the offset on.

Inside a capture the kernels read seed and offset from device memory, which each replay sets before: a replay draws what
the same calls would draw eagerly at that point.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

from . import _dtypes, _kernels

DEFAULT_SEED = 67280421310721

_lock = threading.Lock()


class GraphState:
    """Of one graph: where its kernels read, and how far the offset moves in one replay."""

    def __init__(self, address: int) -> None:
        self.address, self.used = address, 0


class Generator:
    def __init__(self, device: Any = "cpu") -> None:
        self.device = _dtypes.device(device)
        self._seed, self.offset = DEFAULT_SEED, 0

    def manual_seed(self, seed: int) -> Generator:
        self._seed, self.offset = int(seed) & (1 << 64) - 1, 0
        return self

    def initial_seed(self) -> int:
        return self._seed

    def seed(self) -> int:
        raise NotImplementedError("stand-in torch: a seed by chance would make tests vary")

    def get_state(self) -> Any:
        from ._functions import frombuffer

        return frombuffer(bytearray(struct.pack("<QQ", self._seed, self.offset)), dtype=_dtypes.uint8)

    def set_state(self, state: Any) -> Generator:
        if state.dtype is not _dtypes.uint8 or state.device.type != "cpu":
            raise TypeError("RNG state must be a torch.ByteTensor")
        self._seed, self.offset = struct.unpack("<QQ", state.contiguous()._bytes())
        return self

    def draw(self, n: int) -> tuple[int, int]:
        """The seed and offset of a call that makes n numbers."""
        with _lock:
            offset = self.offset
            self.offset += -(-n // 4) * 4
        return self._seed, offset


Generator.__module__ = "torch"

default_generator = Generator()
cuda_generators: list[Generator] = []
graph_states: dict[int, GraphState] = {}  # by capture


def of_device(index: int) -> Generator:
    while len(cuda_generators) <= index:
        cuda_generators.append(Generator(f"cuda:{len(cuda_generators)}"))
        cuda_generators[-1].manual_seed(default_generator.initial_seed())
    return cuda_generators[index]


def manual_seed(seed: int) -> Generator:
    default_generator.manual_seed(seed)
    manual_seed_cuda(seed)
    return default_generator


def manual_seed_cuda(seed: int) -> None:
    from . import cuda

    for i in range(max(cuda.device_count(), 1)):
        of_device(i).manual_seed(seed)


def reset() -> None:
    default_generator.manual_seed(DEFAULT_SEED)
    for generator in cuda_generators:
        generator.manual_seed(DEFAULT_SEED)


def fill(tensor: Any, op: str, a: float, b: float, low: int = 0, generator: Generator | None = None) -> Any:
    """Random numbers into a contiguous tensor."""
    from . import _driver, cuda

    n = tensor.numel()
    if n == 0:
        return tensor
    compute = _kernels.AS_INT if op == "integers" else _kernels.AS_FLOAT
    node = _kernels.make(op, (n,), compute, tensor._storage.device)
    _kernels.set_operand(node.out, tensor, (1,))
    node.f[:] = [a, b]
    node.i[3] = low
    stream = 0
    if not tensor.is_cuda:
        source = generator or default_generator
        node.i[1], node.i[2] = (_signed(x) for x in source.draw(n))
    else:
        stream = cuda.current_stream(tensor.device).cuda_stream
        capture = _driver.capture_id(stream)
        state = graph_states.get(capture)
        if capture and generator is not None:
            raise RuntimeError(
                "stand-in torch: a generator that is not registered with the graph is used in its capture"
            )
        if state is not None:
            node.rng, node.i[0] = state.address, state.used
            state.used += -(-n // 4) * 4
        else:
            source = generator or of_device(tensor._storage.device)
            node.i[1], node.i[2] = (_signed(x) for x in source.draw(n))
    _kernels.submit(node, stream)
    return tensor


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
