"""One capture of a function as a CUDA graph: warmed up, captured beside torch's allocator and random numbers, launched
once, and compared bit by bit with an eager run."""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from . import _core, errors
from ._graph_tree import Trees, UnsupportedValueError

# One capture on a GPU at a time, and no launch meanwhile: torch's random numbers of that GPU belong to the capture.
_gates: dict[int, threading.RLock] = {}
# Graphs that draw random numbers read torch's one seed for all of them: on a GPU, one of them at a time runs.
_drawing: weakref.WeakValueDictionary[int, _core._Launches] = weakref.WeakValueDictionary()


def gate(device: int) -> threading.RLock:
    return _gates.setdefault(device, threading.RLock())


class NotCapturableError(Exception):
    """Why a function cannot be a graph; eager runs are right all the same."""


class CapturedGraph:
    """A graph with its fixed tensors, and how to launch it."""

    def __init__(
        self,
        torch: Any,
        group: _Group,
        capture: _core._Capture,
        graph: Any,
        trees: Trees,
        result: Any,
        outputs: list[Any],
        draws: bool,
    ) -> None:
        self._torch, self._group, self._capture, self._graph = torch, group, capture, graph
        group.members += 1
        self.engines = tuple(capture.engines)
        # Whether results need no gradient even where gradients are recorded.
        self.gradient_free = False
        self._trees, self._result = trees, result
        self._like = [_maker_like(torch, output) for output in outputs]
        # A launch writes torch's seed into a tensor that perhaps only inference mode may write; before 2.4 always.
        self._writes_seed = draws or _version(torch) < (2, 4)

    @property
    def alive(self) -> bool:
        return self._capture.alive

    def replay(self, tensors: Sequence[Any], copies: bool) -> tuple[str | None, Any]:
        """Launches the graph with these inputs: why it did not, or None; and the function's result, with new tensors
        from torch's allocator (`copies`) or the graph's own."""
        torch, result, like = self._torch, self._result, self._like  # another thread may free them behind the launch
        outputs: list[Any] = []

        def make() -> list[Any]:
            outputs.extend(new() for new in like)
            return outputs

        if not self._writes_seed or torch.is_inference_mode_enabled():
            # The outputs are made while the GPU works already.
            refused = self.launch(tensors, make if copies else ())
        else:
            made = make() if copies else ()
            with torch.inference_mode():
                refused = self.launch(tensors, made)
        if refused is not None:
            return refused, None
        return None, self._trees.with_tensors(result, iter(outputs)) if copies else result

    def launch(self, tensors: Sequence[Any], outputs: Any) -> str | None:
        """Launches the graph with these inputs, into these outputs (a list, or what makes it) unless there are none; or
        why it did not."""
        return self._capture.replay(tensors, outputs)

    def free(self) -> None:
        """Waits for the last launch, then frees the graph, its tensors and what the engines keep for it. Safe to call
        again."""
        self._capture.stop()
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.reset()
            self._group.members -= 1
        self._result, self._like = None, []
        self._capture.release()


class _Group:
    """Graphs that share a memory pool of torch's: only one of them runs at a time, which `launches` sees to."""

    def __init__(self, launches: _core._Launches) -> None:
        self.launches = launches
        self.members = 0
        self._pool: Any = None

    def pool(self, torch: Any) -> Any:
        if self.members == 0:
            # A pool whose last graph is gone cannot be captured into again.
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


class Capturer:
    """Captures one function on one GPU, as often as there are shapes."""

    def __init__(self, fn: Callable[..., Any], trees: Trees, device: int, warmup: int) -> None:
        import torch

        self._torch, self._trees, self._device, self._warmup = torch, trees, device, warmup
        self._fn, self._results = fn, Trees(torch, strides=False)
        # None of torch's: it hands out a few in turn, and another thread's work would become part of the graph.
        self._stream = torch.cuda.ExternalStream(_core._capture_stream(device), device)
        self._drawing = _Group(_drawing.setdefault(device, _core._Launches(device)))
        self._plain = _Group(_core._Launches(device))

    def capture(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Any], names: Sequence[str]
    ) -> CapturedGraph:
        """Captures the function for these arguments, and leaves them, the random numbers and the modes as they were.

        `tensors` and `names` are those of the arguments. Raises NotCapturableError; what the function itself raises
        when it runs eagerly goes through.
        """
        torch = self._torch
        state, host_state = torch.cuda.get_rng_state(self._device), torch.get_rng_state()
        try:
            return self._capture(args, kwargs, tensors, names, state)
        finally:
            torch.cuda.set_rng_state(state, self._device)
            torch.set_rng_state(host_state)

    def _capture(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Any],
        names: Sequence[str],
        state: Any,
    ) -> CapturedGraph:
        torch = self._torch
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            fixed = [_buffer_like(torch, tensor) for tensor in tensors]
            trial = [_buffer_like(torch, tensor) for tensor in tensors]
        for buffers in (fixed, trial):
            self._copy(buffers, tensors, names)
        gradient_free = self._warm_up(args, kwargs, trial)
        self._check_unwritten(trial, fixed, names)

        torch.cuda.set_rng_state(state, self._device)
        expected, expected_key = self._reference(args, kwargs)
        draws = not torch.equal(torch.cuda.get_rng_state(self._device), state)
        group = self._drawing if draws else self._plain

        # What is not captured but runs now (on a stream of its own, say) must not find the example's values.
        for buffer in fixed:
            _core._set_bytes([buffer], 0xFF if buffer.is_floating_point() else 0, device=self._device)  # NaN
        self._wait()
        recording = torch.is_grad_enabled() and not gradient_free
        call_args, call_kwargs = self._with(args, kwargs, fixed)
        with torch.no_grad() if recording else contextlib.nullcontext():
            captured = self._record(group, call_args, call_kwargs, fixed, names, expected_key)
        captured.gradient_free = gradient_free
        try:
            torch.cuda.set_rng_state(state, self._device)
            with torch.inference_mode(False), torch.no_grad():
                got = [torch.empty_like(copy) for copy in expected]
            with gate(self._device), torch.inference_mode():
                refused = captured.launch(list(tensors), got)
            if refused is not None:
                raise NotCapturableError(refused)
            self._wait()
            if not _core._same_bytes(got, expected, device=self._device):
                raise NotCapturableError(
                    "the graph's results differ from those of an eager run: something besides its arguments changes "
                    "what it computes (a counter, random numbers of the host), it works on a stream that the capture "
                    "does not know, or it is not deterministic"
                )
            self._check_unwritten(fixed, trial, names)
        except BaseException:
            captured.free()
            raise
        return captured

    def _copy(self, targets: Sequence[Any], sources: Sequence[Any], names: Sequence[str]) -> None:
        try:
            _core._fill(list(targets), list(sources), device=self._device, names=list(names))
        except errors.InputError as error:  # a type or a rank that cannot be copied
            raise NotCapturableError(str(error)) from None

    def _wait(self) -> None:
        self._torch.cuda.current_stream(self._device).synchronize()

    def _with(self, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Any]) -> tuple[Any, Any]:
        """The arguments with other tensors, in new containers: a function may change those."""
        others = iter(tensors)
        return self._trees.with_tensors(tuple(args), others), self._trees.with_tensors(dict(kwargs), others)

    def _warm_up(self, args: Sequence[Any], kwargs: Mapping[str, Any], trial: Sequence[Any]) -> bool:
        """Runs the function as often as asked, at least once. True when its results need no gradient where gradients
        are recorded: only then may the graph stand in for it there."""
        torch = self._torch

        def needs_gradient() -> bool:
            call_args, call_kwargs = self._with(args, kwargs, trial)
            found: list[Any] = []
            with contextlib.suppress(UnsupportedValueError):  # said later, of the captured result
                self._results.key(self._fn(*call_args, **call_kwargs), found)
            return any(t.requires_grad for t in found)

        if torch.is_grad_enabled():
            gradient_free = not needs_gradient()
        else:
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    gradient_free = not needs_gradient()
            except Exception:
                # It does not run where gradients are recorded; in the caller's mode it may.
                gradient_free = False
                needs_gradient()
        for _ in range(1, self._warmup):
            needs_gradient()
        return gradient_free

    def _check_unwritten(self, used: Sequence[Any], untouched: Sequence[Any], names: Sequence[str]) -> None:
        self._wait()
        for name, one, other in zip(names, used, untouched, strict=True):
            if not _core._same_bytes([one], [other], device=self._device):
                raise NotCapturableError(f"it writes into its argument {name}: a graph would write into a copy")

    def _reference(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Hashable]:
        """What an eager run returns for the caller's own tensors: packed copies of its tensors, and a key of it all."""
        torch = self._torch
        outputs: list[Any] = []
        key = self._result_key(self._fn(*args, **kwargs), outputs)
        with torch.inference_mode(False), torch.no_grad():
            copies = [torch.empty(o.shape, dtype=o.dtype, device=o.device) for o in outputs]
        self._copy(copies, [o.detach() for o in outputs], [f"result {k}" for k in range(len(outputs))])
        # Now, before the function runs again: it may change host memory that the GPU still reads.
        self._wait()
        return copies, key

    def _result_key(self, result: Any, outputs: list[Any]) -> Hashable:
        try:
            key = self._results.key(result, outputs, "the result")
        except UnsupportedValueError as error:
            raise NotCapturableError(str(error)) from None
        for output in outputs:
            if not output.is_cuda or output.get_device() != self._device:
                raise NotCapturableError(f"a result lies on {output.device}, not on cuda:{self._device}")
        return key

    def _record(
        self, group: _Group, args: Any, kwargs: Any, fixed: list[Any], names: Sequence[str], expected_key: Hashable
    ) -> CapturedGraph:
        """The capture itself."""
        torch = self._torch
        pool, graph, capture, running = group.pool(torch), None, None, False
        with gate(self._device), torch.cuda.stream(self._stream), _no_collection():
            try:
                _forget_workspaces(torch)
                graph = self._begin(pool)
                running = True
                capture = _core._Capture(self._stream.cuda_stream, group.launches)
                with _uncached_autocast(torch):
                    result = self._fn(*args, **kwargs)
                nodes = capture.nodes
                outputs: list[Any] = []
                key = self._result_key(result, outputs)
                running = False
                self._end(graph, quiet=nodes == 0)
                if nodes == 0:
                    raise NotCapturableError("it does no work on the GPU")
                if key != expected_key:
                    raise NotCapturableError(
                        "in the capture it returned another structure, shape or value than in an eager run: something "
                        "besides its arguments decides about them"
                    )
                results = [f"result {k}" for k in range(len(outputs))]
                capture.bind(graph, fixed, outputs, names, results)
                return CapturedGraph(
                    torch, group, capture, graph, self._trees, result, outputs, draws=group is self._drawing
                )
            except BaseException as error:
                if running:
                    with contextlib.suppress(Exception):
                        self._end(graph, quiet=True)
                self._recover(graph, pool)
                if capture is not None:
                    capture.release()
                if isinstance(error, NotCapturableError) or not isinstance(error, Exception):
                    raise
                raise NotCapturableError(_said(error)) from error
            finally:
                _forget_workspaces(torch)

    def _begin(self, pool: Any) -> Any:
        """A graph whose capture has begun on the current stream."""
        torch = self._torch
        # torch's seed lies in tensors that the first capture makes. Made in inference mode, they could not be written
        # outside of it, by others; where somebody made them so, only inference mode can.
        for inference in (False, True):
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.inference_mode(inference):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                return graph
            except RuntimeError as error:
                self._recover(graph, pool, heal=False)
                if inference or "inference tensor" not in str(error):
                    raise
        raise AssertionError("one of the two was returned or raised")

    def _end(self, graph: Any, *, quiet: bool) -> None:
        # The function may have left another stream current, where torch would not end the capture.
        with self._torch.cuda.stream(self._stream):
            if not quiet:
                graph.capture_end()
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of an empty graph
                graph.capture_end()

    def _recover(self, graph: Any, pool: Any, *, heal: bool = True) -> None:
        """After a capture that failed, torch's allocator and random numbers still believe in it: tells them."""
        torch = self._torch
        with contextlib.suppress(errors.CudaError):
            _core._abandon_capture(self._stream.cuda_stream, self._device)
        if graph is not None:
            graph.reset()
        with contextlib.suppress(AttributeError, RuntimeError):  # the end of the capture did it
            torch._C._cuda_endAllocateToPool(self._device, pool)
            torch._C._cuda_releasePool(self._device, pool)
        if heal:
            self._heal()

    def _heal(self) -> None:
        """The end of another capture sets torch's generator right."""
        torch = self._torch
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            word = torch.zeros(1, device=f"cuda:{self._device}")
            self._stream.synchronize()
            with contextlib.suppress(RuntimeError):
                healing = self._begin(torch.cuda.graph_pool_handle())
                word.zero_()
                healing.capture_end()
                healing.reset()
            try:
                torch.randn(1, device=word.device)
            except RuntimeError as error:
                raise errors.CudaError(
                    f"after a capture that failed, torch's random numbers on cuda:{self._device} do not work any more "
                    f"({error}). Restart the process, and do not prepare this function as a graph."
                ) from error


def _version(torch: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def _buffer_like(torch: Any, tensor: Any) -> Any:
    """An uninitialised tensor of this shape that `_fill` can write: of the same layout where that has no gaps."""
    return _maker_like(torch, tensor)()


def _maker_like(torch: Any, tensor: Any) -> Callable[[], Any]:
    """Makes such tensors."""
    if _has_no_gaps(tensor):
        like = tensor.detach()
        return lambda: torch.empty_like(like)
    shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
    return lambda: torch.empty(shape, dtype=dtype, device=device)


def _has_no_gaps(tensor: Any) -> bool:
    """Do the elements fill their memory, each once, in whatever order of dimensions? `empty_like` keeps that order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return bool(tensor.numel() == 0)
        expected *= size
    return True


def _forget_workspaces(torch: Any) -> None:
    """cuBLAS keeps a workspace for each stream. The graph gets one from its own pool, which nobody else then uses."""
    clear = getattr(getattr(torch, "_C", None), "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Finalisers of others, which may use CUDA, do not run in the middle of a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def modes(torch: Any) -> tuple[bool, Any]:
    """What else than the arguments decides which kernels torch runs: deterministic mode, autocast's dtype."""
    return torch.are_deterministic_algorithms_enabled(), autocast_dtype(torch)


def autocast_dtype(torch: Any) -> Any:
    """The dtype of torch's autocast on the GPU, or None where it is off."""
    enabled = getattr(torch, "is_autocast_enabled", None)
    if enabled is None or not enabled():
        return None
    of = getattr(torch, "get_autocast_dtype", None)
    return of("cuda") if of is not None else torch.get_autocast_gpu_dtype()


def _uncached_autocast(torch: Any) -> Any:
    """Autocast keeps the weights that it has cast as long as the caller's context lasts: a graph would outlive them."""
    dtype = autocast_dtype(torch)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=dtype, cache_enabled=False)


def _said(error: BaseException) -> str:
    """The first line of an error, and what it usually means."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if any(word in str(error) for word in ("is capturing", "during capture", "CAPTURE_UNSUPPORTED", "CAPTURE_INVALID")):
        text += " (a graph cannot hold a wait for the GPU: .item(), .cpu(), a shape that depends on the data)"
    return text
