"""The Rust extension. Written by hand; `make check` compares it with the built module (mypy.stubtest)."""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

_Shape = tuple[int, ...]

@final
class TensorInfo:
    """One input or output of an engine."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str:
        """Such as "float32", "bfloat16", "int64", "bool"."""
    @property
    def shape(self) -> _Shape:
        """-1 where the dimension is dynamic."""
    @property
    def mode(self) -> Literal["input", "output"]: ...
    @property
    def location(self) -> Literal["device", "host"]: ...
    @property
    def format(self) -> str: ...
    @property
    def profiles(self) -> list[tuple[_Shape, _Shape, _Shape]]:
        """(min, opt, max) of each optimisation profile; empty for an output."""
    @property
    def profile(self) -> list[tuple[_Shape, _Shape, _Shape]]:
        """The same as `profiles`."""

@final
class Tensor:
    """A result that owns its memory, for callers whose inputs named no array library."""

    @property
    def shape(self) -> _Shape: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def data_ptr(self) -> int: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]: ...
    def numpy(self) -> npt.NDArray[Any]: ...

@final
class DeviceMemory:
    """Device memory of the caller, for the contexts of engines that never run at the same time."""

    def __new__(cls, nbytes: int, device: int = 0) -> Self: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> int: ...

@final
class Engine:
    """A TensorRT engine, loaded and ready to be called."""

    def __new__(
        cls,
        path: str | os.PathLike[str],
        *,
        device: int = 0,
        graphs: Literal["auto", "off", "require"] = "auto",
        outputs: Literal["pooled", "fresh"] = "pooled",
        on_strided: Literal["error", "copy"] = "error",
        on_dtype: Literal["error", "cast"] = "error",
        host: Literal["auto", "mapped", "staged", "error"] = "auto",
        profile: Literal["auto"] | int = "auto",
        max_contexts: int = 1,
        timeout: float | None = None,
        plugins: Sequence[str | os.PathLike[str]] = (),
        allow_host_code: bool = False,
        verify: Literal["auto", "off"] = "auto",
        warmup: int = 2,
        graph_bytes: int = 268435456,
        device_memory: DeviceMemory | None = None,
        refit: str | os.PathLike[str] | None = None,
        weight_streaming_budget: int | None = None,
    ) -> Self: ...
    def __call__(
        self,
        *args: Any,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,
        **inputs: Any,
    ) -> dict[str, Any]: ...
    def run(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        *,
        stream: Any = None,
        out: Mapping[str, Any] | None = None,
        synchronize: bool = False,
        timeout: float | None = None,
    ) -> dict[str, Any]: ...
    def prepare(
        self,
        shapes: Sequence[Mapping[str, Sequence[int]]] | None = None,
        *,
        inputs: Sequence[Mapping[str, Any]] | None = None,
        stream: Any = None,
    ) -> list[dict[str, Any]]:
        """Warms up, captures and checks these shapes (or these very arrays), so that no live call has to."""
    @property
    def inputs(self) -> dict[str, TensorInfo]: ...
    @property
    def outputs(self) -> dict[str, TensorInfo]: ...
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def device(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def num_profiles(self) -> int: ...
    @property
    def tensorrt_version(self) -> str: ...
    @property
    def load_report(self) -> dict[str, Any]: ...
    @property
    def stats(self) -> dict[str, Any]: ...
    @property
    def metadata(self) -> dict[str, Any] | None: ...
    @property
    def device_memory_size(self) -> int: ...
    def inspect(self, shapes: Mapping[str, Sequence[int]] | None = None, *, profile: int = 0) -> str:
        """TensorRT's JSON about the plan's layers."""
    def layer_times(
        self, inputs: Mapping[str, Any] | Sequence[Any], *, runs: int = 10, stream: Any = None
    ) -> list[list[tuple[str, float]]]:
        """(layer name, milliseconds) of each layer, run by run. Needs graphs="off"."""
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

def pinned_empty(shape: int | Sequence[int], dtype: npt.DTypeLike | None = None) -> np.ndarray[Any, Any]:
    """A numpy array (float32 if no dtype is given) in page-locked memory that the GPU can reach."""

def record_stream(tensor: Any, stream: Any) -> None:
    """Says that `stream` uses `tensor`, so that its buffer is not reused before that stream has passed this point."""

def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a plan's header says, without TensorRT; raises `jetrt.errors.PlanError`."""

def build_info() -> dict[str, Any]:
    """How this extension was built: version, profile, target, rustc, python_abi, tensorrt."""

def library_info() -> dict[str, Any]:
    """Which libnvinfer and libcuda are in use, and which step of the search found them."""

@final
class _Launches:
    """Launches of graphs that share memory: one at a time, each behind the one before, on any threads and streams."""

    def __new__(cls, device: Any = None) -> Self: ...
    def wait(self) -> None: ...

@final
class _Capture:
    """The capture that runs on a stream: which engines take part, and later the launches of its graph."""

    def __new__(cls, stream: int, launches: _Launches) -> Self: ...
    @property
    def engines(self) -> list[str]: ...
    @property
    def nodes(self) -> int: ...
    @property
    def alive(self) -> bool: ...
    def bind(
        self,
        graph: Any,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> None: ...
    def replay(self, inputs: Sequence[Any], outputs: Sequence[Any], stream: Any = None) -> str | None:
        """None, or why nothing was launched. Raises `jetrt.errors.ClosedEngineError`."""
    def stop(self) -> None: ...
    def release(self) -> None: ...

def _capture_stream(device: Any) -> int:
    """The handle of a stream on which nobody else enqueues."""

def _abandon_capture(stream: int, device: Any = None) -> None:
    """Ends a capture that was left running on this stream, if one is."""

@final
class _Guards:
    """Which prepared call is this one? Arguments are compared natively."""

    def __new__(cls) -> Self: ...
    def add(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Any, gradient_free: bool, value: Any
    ) -> bool: ...
    def remove(self, value: Any) -> None: ...
    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Any, recording: bool
    ) -> tuple[Any, list[Any]] | None: ...

@final
class _Unchanged:
    """Is what was found in these dicts still there: objects, tensors at their addresses, and what has to be empty?"""

    def __new__(
        cls,
        objects: Sequence[tuple[dict[str, Any], str, Any]],
        tensors: Sequence[tuple[dict[str, Any], str, int]],
        empty: Sequence[Any],
    ) -> Self: ...
    def changed(self) -> int | None: ...

def _fill(
    targets: Sequence[Any],
    sources: Sequence[Any],
    stream: Any = None,
    *,
    device: Any = None,
    names: Sequence[str] | None = None,
) -> None:
    """Copies each source over its target, in one launch."""

def _set_bytes(tensors: Sequence[Any], value: int, stream: Any = None, *, device: Any = None) -> None:
    """Sets every byte of these tensors, which have no gaps."""

def _same_bytes(first: Sequence[Any], second: Sequence[Any], *, device: Any = None) -> bool:
    """Do these tensors hold the same bytes? Their streams must have been waited for."""

def _machine(device: int = 0) -> dict[str, Any]:
    """tensorrt, cuda, sm, sm_count, gpu, memory_bytes and integrated of a GPU."""

@final
class _Latest:
    """The newest object that was published, for readers that must not wait."""

    def __new__(cls, max_age_s: float) -> Self: ...
    def publish(self, value: Any) -> None: ...
    def clear(self) -> None: ...
    def get(self) -> Any:
        """None when nothing was published for `max_age_s` seconds."""

@final
class _Sysfs:
    """Looks at the kernel's files below a root folder."""

    def __new__(cls, root: str | os.PathLike[str]) -> Self: ...
    def sample(self) -> dict[str, Any]:
        """What is known now, by name; None is unknown. Without the GIL, for as long as the kernel takes."""

@final
class _BuildProgress:
    """What TensorRT reports during a build."""

    def events(self) -> list[tuple[str, str, str, int]]: ...
    def cancel(self) -> None: ...

@final
class _Network:
    """A network parsed from an ONNX file and the configuration it is to be built with; for the process that builds."""

    def __new__(
        cls,
        *,
        strongly_typed: bool = False,
        plugins: Sequence[str | os.PathLike[str]] = ...,
        device: int | None = None,
    ) -> Self: ...
    @property
    def tensorrt(self) -> str: ...
    @property
    def progress(self) -> _BuildProgress: ...
    def parse(self, path: str | os.PathLike[str], flags: Sequence[str] = ...) -> list[dict[str, Any]]: ...
    @property
    def inputs(self) -> list[dict[str, Any]]: ...
    @property
    def outputs(self) -> list[dict[str, Any]]: ...
    @property
    def layers(self) -> list[dict[str, Any]]: ...
    def set_layer_precision(self, index: int, dtype_name: str) -> None: ...
    def set_io_format(self, name: str, dtype_name: str | None = None, formats: Sequence[str] = ...) -> None: ...
    @property
    def flags(self) -> list[str]: ...
    @property
    def known_flags(self) -> list[str]: ...
    def set_flag(self, name: str, on: bool = True) -> None: ...
    def memory_limit(self, pool: str) -> int: ...
    def set_memory_limit(self, pool: str, bytes: int) -> None: ...
    def set_option(self, name: str, value: int | str) -> None: ...
    def option(self, name: str) -> int: ...
    def set_tactic_sources(self, names: Sequence[str]) -> None: ...
    def set_plugins_to_serialize(self, paths: Sequence[str | os.PathLike[str]]) -> None: ...
    def add_profile(
        self,
        shapes: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]],
        values: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = ...,
    ) -> int: ...
    def set_calibrator(
        self,
        algorithm: Literal["entropy", "minmax"],
        batch_size: int,
        next_batch: Any,
        shapes: Mapping[str, Sequence[int]],
        cache: bytes | None = None,
    ) -> None: ...
    @property
    def calibration_cache(self) -> bytes | None: ...
    @property
    def calibration_batches(self) -> int: ...
    def set_timing_cache(self, data: bytes, ignore_mismatch: bool = False) -> bool: ...
    def combine_timing_cache(self, data: bytes) -> bool: ...
    def timing_cache(self) -> bytes | None: ...
    def build(self, path: str | os.PathLike[str]) -> dict[str, Any]: ...
