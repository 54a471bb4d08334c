"""The process that builds and tries plans; started by `process` and by nothing else.

A fresh interpreter for each job: a crash or a lack of memory ends it and nothing else, and all memory returns with it.
It reads one request, answers with events, and ends with a result or an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import JetrtError
from .arrays import Array
from .frames import FrameError, Link, Message
from .system import MemoryWatch

__all__: list[str] = []

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_HEARTBEAT = 0.5


class Context:
    """What a job sees of the world: its request, events to send, questions to ask."""

    def __init__(self, link: Link, request: Message, arrays: Mapping[str, Array]) -> None:
        self.link, self.request, self.arrays = link, request, arrays
        self.lines: list[tuple[int, str]] = []
        self._progress: Any = None

    def phase(self, name: str) -> None:
        self.link.send({"event": "phase", "phase": name})

    def ask(self, question: Message) -> tuple[Message, dict[str, Array]]:
        self.link.send({"event": "ask", **question})
        return self.link.receive()

    @contextlib.contextmanager
    def watched(self, progress: Any) -> Iterator[None]:
        """Sends what TensorRT reports while it builds; a stop that is asked for (SIGTERM) is passed on to it."""
        self._progress = progress
        ended = threading.Event()

        def pump() -> None:
            while not ended.wait(_HEARTBEAT):
                self._send_progress()

        thread = threading.Thread(target=pump, name="jetrt-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._send_progress()
            self._progress = None

    def _send_progress(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            for kind, phase, parent, number in self._progress.events():
                self.link.send({"event": "progress", "kind": kind, "phase": phase, "parent": parent, "number": number})

    def stop(self) -> None:
        progress = self._progress
        if progress is None:
            os._exit(128 + signal.SIGTERM)
        progress.cancel()


class _Lines(logging.Handler):
    """TensorRT's log: kept for the result, and sent at once, so that the last lines survive a crash."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.context.lines.append((record.levelno, line))
        with contextlib.suppress(BrokenPipeError):
            self.context.link.send({"event": "log", "level": record.levelno, "line": line})


def _die_with(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _error(error: Exception) -> Message:
    if isinstance(error, JetrtError):
        fields = {key: _plain(value) for key, value in vars(error).items() if key != "message"}
        return {"class": type(error).__name__, "message": error.message, "fields": fields}
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename and os.fsdecode(error.filename)
        return {"class": "OSError", "errno": error.errno, "message": error.strerror or str(error), "filename": name}
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"class": "", "message": f"{type(error).__name__}: {error}", "fields": {"log": trace.splitlines()[-20:]}}


def main() -> None:
    # Descriptors of their own: libraries may print to the usual ones, and what they print is shown when they crash.
    incoming, outgoing, parent = (int(text) for text in sys.argv[1:4])
    _die_with(parent)
    link = Link(os.fdopen(incoming, "rb", buffering=0), os.fdopen(outgoing, "wb"))
    try:
        request, arrays = link.receive()
    except (EOFError, FrameError) as error:
        sys.exit(f"no request came: {error}")
    context = Context(link, request, arrays)
    logger = logging.getLogger("jetrt.tensorrt")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_Lines(context))
    signal.signal(signal.SIGTERM, lambda *_: context.stop())

    done: list[tuple[Message, Mapping[str, Array]]] = []

    def work() -> None:
        from . import jobs

        try:
            result, found = jobs.JOBS[request["job"]](context)
            done.append(({"event": "result", "result": result, "log": context.lines}, found))
        except Exception as error:
            done.append(({"event": "error", "error": _error(error), "log": context.lines}, {}))

    # In a thread, so that signals are handled while native code runs.
    thread = threading.Thread(target=work, name="jetrt-job")
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
    message, found = done[0]
    memory = MemoryWatch(os.getpid())
    memory.sample(share=False)
    with contextlib.suppress(BrokenPipeError):
        link.send({**message, "peak": memory.peak_resident}, found)
    # What is left is TensorRT's teardown, which frees what the kernel frees as well.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
