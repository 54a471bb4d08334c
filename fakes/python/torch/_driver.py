"""The stand-in CUDA driver, as far as torch needs it. A real driver is refused: nothing here is fit for one."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

from ._standin import counts

_NAMES = {
    1: "invalid argument",
    2: "out of memory",
    700: "an illegal memory access was encountered",
    710: "device-side assert triggered",
    900: "operation not permitted when stream is capturing",
    901: "operation failed due to a previous error during capture",
    904: "capturing stream has unjoined work",
    905: "dependency created on uncaptured work in another stream",
    906: "operation would make the legacy stream depend on a capturing blocking stream",
    907: "operation not permitted on an event last recorded in a capturing stream",
}

OUT_OF_MEMORY = 2
NOT_READY = 600
RELAXED = 2


class AcceleratorError(RuntimeError):
    """What torch raises where CUDA answers with an error."""


AcceleratorError.__module__ = "torch"


def _open() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library["fake_cuda_launch"]
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"the stand-in torch works on the stand-in CUDA driver alone ({error}): start the process by "
            "`python tests/fakes.py -- COMMAND …`"
        ) from error
    return library


library = _open()


class _Thread(threading.local):
    device = 0
    #: The device of the innermost call under way, where that is not the current one.
    inside: int | None = None


thread = _Thread()
_contexts: list[int] = []
_lock = threading.RLock()


def _passed(argument: object) -> object:
    return ctypes.c_uint64(argument & (1 << 64) - 1) if isinstance(argument, int) else argument


def code(name: str, *arguments: object) -> int:
    """Calls a driver function; ints are passed as 64 bits. Returns what it answers."""
    return int(library[name](*map(_passed, arguments)))


def text_of(error: int) -> str:
    if error in _NAMES:
        return _NAMES[error]
    text = ctypes.c_char_p()
    library["cuGetErrorString"](error, ctypes.byref(text))
    return (text.value or b"unknown error").decode()


def check(error: int) -> None:
    if error:
        raise AcceleratorError(
            f"CUDA error: {text_of(error)}\nCUDA kernel errors might be asynchronously reported at some other API call."
        )


def call(name: str, *arguments: object) -> None:
    check(code(name, *arguments))


def made(name: str, *arguments: object) -> int:
    """What a function of the form `f(&handle, …)` makes."""
    handle = ctypes.c_uint64()
    call(name, ctypes.byref(handle), *arguments)
    return handle.value


def device_count() -> int:
    count = ctypes.c_int()
    if code("cuInit", 0) or code("cuDeviceGetCount", ctypes.byref(count)):
        return 0
    return count.value


def start() -> None:
    with _lock:
        if not _contexts:
            call("cuInit", 0)
            _contexts.extend(made("cuDevicePrimaryCtxRetain", i) for i in range(device_count()))


def started() -> bool:
    return bool(_contexts)


def enter(device: int) -> None:
    """Makes a device's primary context current on this thread, as cudaSetDevice does."""
    code("cuCtxSetCurrent", _contexts[device])


@contextlib.contextmanager
def on(device: int) -> Iterator[None]:
    """The device for the time of a call; afterwards the thread's current one is as before."""
    before, thread.inside = thread.inside, device
    enter(device)
    try:
        yield
    finally:
        thread.inside = before
        outer = thread.device if before is None else before
        if outer != device:
            enter(outer)


def capture_id(stream: int) -> int:
    """Of the capture that runs on a stream; 0: none."""
    status, identity = ctypes.c_int(), ctypes.c_uint64()
    error = code("cuStreamGetCaptureInfo_v2", stream, ctypes.byref(status), ctypes.byref(identity), None, None, None)
    return identity.value if error == 0 and status.value else 0


def idle(stream: int) -> bool:
    """Does nothing capture here, nor anything that work on this stream would break?"""
    status = ctypes.c_int()
    return code("cuStreamIsCapturing", stream, ctypes.byref(status)) == 0 and not status.value


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Calls that a capture would forbid are allowed for a while, as in torch's allocator."""
    mode = ctypes.c_int(RELAXED)
    code("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        code("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def wait(stream: int) -> None:
    counts["waits"] += 1
    call("cuStreamSynchronize", stream)
