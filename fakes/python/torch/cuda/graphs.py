"""CUDA graphs: the driver's own rules of capture, memory of their own, random numbers that go on with each replay."""

from __future__ import annotations

import ctypes
import gc
import warnings
from typing import Any

from .. import _driver, _kernels, _memory, _random, _standin
from .._standin import counts
from .streams import Stream, StreamContext, current_stream

_MODES = {"global": 0, "thread_local": 1, "relaxed": 2}


def graph_pool_handle() -> tuple[int, int]:
    return _memory.new_pool_id(of_graph=False)


def is_current_stream_capturing() -> bool:
    if not _driver.started():
        return False
    stream = current_stream()
    with _driver.on(stream.device_index):
        return bool(_driver.capture_id(stream.cuda_stream))


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        from . import init

        init()
        if keep_graph:
            raise NotImplementedError("stand-in torch: CUDAGraph(keep_graph=True)")
        self._exec = self._capture = self._stream = 0
        self._device = -1
        self._pool: tuple[int, int] | None = None
        self._nodes: list[Any] = []
        self._launched_on: set[int] = set()
        self._rng: _random.GraphState | None = None
        self._rng_block: _memory.Block | None = None

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global") -> None:
        if capture_error_mode not in _MODES:
            raise RuntimeError(
                f"Unknown capture error mode. Expected `global`, `thread_local`, or `relaxed`, got {capture_error_mode}"
            )
        if self._exec or self._capture:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, create a new instance."
            )
        stream = current_stream()
        if stream.cuda_stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        _standin.reached("capture_begin")
        self._device, self._stream = stream.device_index, stream.cuda_stream
        # Where the kernels of random numbers read their seed and offset.
        self._rng_block = _memory.allocate(16, self._device, 0)
        with _driver.on(self._device):
            _driver.call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_MODES[capture_error_mode]))
            self._capture = _driver.capture_id(self._stream)
            if not self._capture:
                graph = ctypes.c_uint64()
                _driver.code("cuStreamEndCapture", self._stream, ctypes.byref(graph))
                _driver.code("cuGraphDestroy", graph.value)
                raise _driver.AcceleratorError("CUDA error: the capture that was begun is not there")
        self._pool = tuple(pool) if pool is not None else _memory.new_pool_id(of_graph=True)
        self._rng = _random.graph_states[self._capture] = _random.GraphState(self._rng_block.ptr)
        _memory.pool_enter(self._pool, self._capture)

    def capture_end(self) -> None:
        if not self._capture:
            raise RuntimeError("stand-in torch: capture_end without capture_begin")
        stream = current_stream()
        if stream.cuda_stream != self._stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        capture, self._capture = self._capture, 0
        graph = ctypes.c_uint64()
        with _driver.on(self._device):
            error = _driver.code("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._nodes = _kernels.captured_nodes(capture)
        _random.graph_states.pop(capture, None)
        _memory.pool_captured(capture)
        try:
            _driver.check(error)
            _standin.reached("capture_end")
            count = ctypes.c_size_t()
            _driver.call("cuGraphGetNodes", graph.value, None, ctypes.byref(count))
            if count.value == 0:
                warnings.warn("The CUDA Graph is empty.", stacklevel=2)
            with _driver.on(self._device):
                self._exec = _driver.made("cuGraphInstantiateWithFlags", graph.value, 0)
        except BaseException:
            self._drop()
            raise
        finally:
            if graph.value:
                _driver.code("cuGraphDestroy", graph.value)

    def replay(self) -> None:
        if not self._exec:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        _standin.reached("replay")
        with _driver.on(self._device):
            handle = current_stream(self._device).cuda_stream
            if self._rng is not None and self._rng.used:
                node = _kernels.make("set_rng", (), 0, self._device)
                node.rng = self._rng.address
                seed, offset = _random.of_device(self._device).draw(self._rng.used)
                node.i[1], node.i[2] = _random._signed(seed), offset
                _kernels.submit(node, handle)
            counts["replays"] += 1
            _driver.call("cuGraphLaunch", self._exec, handle)
            self._launched_on.add(handle)

    def pool(self) -> tuple[int, int]:
        if not self._exec:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        assert self._pool is not None
        return self._pool

    def reset(self) -> None:
        if self._exec:
            _driver.code("cuGraphExecDestroy", self._exec)
            self._exec = 0
        self._drop()

    def _drop(self) -> None:
        if self._pool is not None:
            # Work of the graph may be under way: its memory and its nodes go when the streams are through.
            _memory.pool_leave(self._pool, self._launched_on)
            self._pool = None
        if self._nodes:
            if self._launched_on:
                for handle in self._launched_on:
                    with _driver.on(self._device):
                        if not _driver.capture_id(handle):
                            _driver.code("cuStreamSynchronize", handle)
            self._nodes = []
        if self._rng_block is not None:
            _memory._give_back(self._rng_block)
            self._rng_block = None

    def debug_dump(self, path: str) -> None:
        raise NotImplementedError("stand-in torch: CUDAGraph.debug_dump")

    def __del__(self) -> None:
        if getattr(self, "_rng_block", None) is not None:
            self.reset()


class graph:  # noqa: N801 - torch's name
    """`with torch.cuda.graph(g):` captures on a side stream of its own."""

    default_capture_stream: Stream | None = None

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        cls = type(self)
        if cls.default_capture_stream is None:
            cls.default_capture_stream = Stream()
        self.pool = pool
        self.capture_stream = stream if stream is not None else cls.default_capture_stream
        self.stream_ctx = StreamContext(self.capture_stream)
        self.cuda_graph, self.capture_error_mode = cuda_graph, capture_error_mode

    def __enter__(self) -> None:
        from . import empty_cache, synchronize

        synchronize()
        gc.collect()
        empty_cache()
        self.stream_ctx.__enter__()
        self.cuda_graph.capture_begin(pool=self.pool, capture_error_mode=self.capture_error_mode)

    def __exit__(self, *exception: object) -> None:
        self.cuda_graph.capture_end()
        self.stream_ctx.__exit__(*exception)


def make_graphed_callables(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("stand-in torch: make_graphed_callables")
