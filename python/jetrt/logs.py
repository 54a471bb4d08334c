"""JSON logs: one object per line, written away from the thread that logs.

    handle = jetrt.logs.configure_json_logging(level="INFO")
    ...
    handle.close()  # writes what is waiting; happens at interpreter exit, too

jetrt logs through the standard library's `logging`, to loggers below ``jetrt``, so that any other set-up works as well.
Each line has time, level, logger, event, message and fields, and error where an exception was logged:

    {"time": "2026-08-22T09:30:12.345Z", "level": "WARNING", "logger": "jetrt.thermal",
     "event": "thermal_throttle_entered", "message": "thermal throttle active; gpu_temp=83C; clock=750mhz; …",
     "fields": {"device": 0, "gpu_temp_c": 83.0, "clock_mhz": 750, …}}

Event and fields come from ``extra={"event": "…", "fields": {…}}``. A package for JSON logs would know nothing of the
fields of jetrt's exceptions, nor count what it drops, and numpy is to stay the only requirement.
"""

from __future__ import annotations

import atexit
import copy
import datetime
import json
import logging
import logging.handlers
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TextIO

__all__ = ["JsonFormatter", "JsonLogging", "configure_json_logging"]

#: Records that wait to be written; what comes while so many wait is dropped and counted.
CAPACITY: Final = 10_000
#: Seconds for which closing waits for a stream that takes nothing.
PATIENCE_S: Final = 2.0
#: Levels of containers, and of causes of an exception, that are followed; items of a container; characters of a text
#: that stands for an object.
DEPTH, ITEMS, CHARACTERS = 6, 1000, 1000

_log = logging.getLogger("jetrt")

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # no generic class before Python 3.11


def configure_json_logging(stream: TextIO | None = None, level: str | int = "INFO") -> JsonLogging:
    """Writes what ``jetrt`` and the loggers below it log, from `level` on, to `stream` (default: stderr).

    Changes of the thermal state and the loss of telemetry are written at every level. Handlers that the program has
    set up besides go on to work. A full queue drops records rather than hold up who logs: the next line says how many.

    Raises ValueError for a level that does not exist, and for a stream that these logs already go to.
    """
    return JsonLogging(sys.stderr if stream is None else stream, level)


# --------------------------------------------------------------------------------------------------- what is written


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON, for handlers of one's own."""

    def format(self, record: logging.LogRecord) -> str:
        line = getattr(record, "json_line", None) or as_line(record)
        # In ASCII, since the stream's encoding may be any; what is no number in JSON is a text by now.
        return json.dumps(line, allow_nan=False)


def as_line(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says. Holds nothing of the caller's: not its arguments, which may change, nor its stack."""
    at = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    line = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "event": getattr(record, "event", None),
        "message": _message(record),
        "fields": plain(getattr(record, "fields", None) or {}),
    }
    if record.exc_info and record.exc_info[1] is not None:
        line["error"] = _error(record.exc_info[1])
    return line


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit are no reason to lose the record
        return f"{record.msg} {record.args!r}"


def _error(error: BaseException, depth: int = DEPTH) -> dict[str, Any]:
    kind = type(error)
    fields = {name: value for name, value in vars(error).items() if name != "message"}
    line = {
        "type": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
        "message": _text(error),
        "fields": plain(fields),
        "traceback": "".join(traceback.format_tb(error.__traceback__)),
    }
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth > 0:
        line["cause"] = _error(cause, depth - 1)
    return line


def plain(value: Any, depth: int = DEPTH) -> Any:
    """As JSON can hold it: not-a-number becomes a text, an array its type and shape, any other object its text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN")
    if isinstance(value, str):
        return str(value)
    if depth > 0 and isinstance(value, Mapping):
        return {_text(key): plain(value[key], depth - 1) for key in list(value)[:ITEMS]}
    if depth > 0 and isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item, depth - 1) for item in list(value)[:ITEMS]]
        return [*items, f"… {len(value) - ITEMS} more"] if len(value) > ITEMS else items
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        if shape == () and type(value).__module__ == "numpy":
            return plain(value.item(), depth)
        return f"{_text(dtype)}{list(shape)}"  # not its values, which may lie on a GPU that is busy
    return _text(value)


def _text(value: Any) -> str:
    try:
        text = str(value)
    except Exception as error:
        return f"<{type(value).__name__} whose text raises {type(error).__name__}>"
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}… {len(text) - CHARACTERS} characters more"


# ---------------------------------------------------------------------------------------------------- how it gets there


class JsonLogging:
    """JSON logs on their way to one stream, until `close`. Made by `configure_json_logging`."""

    def __init__(self, stream: TextIO, level: str | int = "INFO", *, capacity: int = CAPACITY) -> None:
        global _level_before
        self._handler = _Handler(stream, _number(level), capacity)
        with _lock:
            if any(other.stream is stream for other in _open):
                raise ValueError(
                    f"jetrt's JSON logs already go to {getattr(stream, 'name', stream)}; close the first handle before"
                )
            if not _open:
                _level_before = _log.level
            _open.append(self._handler)
            _log.addHandler(self._handler)
            _set_level()
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """Records that were not written, because too many were waiting or because the stream failed."""
        return self._handler.dropped + self._handler.failed

    def close(self) -> None:
        """Writes what is waiting and ends; gives up after two seconds. The stream stays open. Closing again does
        nothing."""
        with _lock:
            if self._handler not in _open:
                return
            _open.remove(self._handler)
            _log.removeHandler(self._handler)
            _set_level()
        atexit.unregister(self.close)
        self._handler.close()

    def __enter__(self) -> JsonLogging:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(logging.handlers.QueueHandler):
    """On the side of who logs: makes the line, and leaves it to the thread that writes."""

    def __init__(self, stream: TextIO, level: int, capacity: int) -> None:
        self.stream, self.lowest, self.capacity = stream, level, capacity
        #: Counted under the handler's lock, and by the writing thread.
        self.dropped = self.failed = 0
        self._listener: _Listener | None = None
        self.waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(capacity)
        super().__init__(self.waiting)
        self.addFilter(lambda record: record.levelno >= level or getattr(record, "always", False))

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        line = as_line(record)
        record = copy.copy(record)  # other handlers get the original
        record.json_line = line
        record.msg, record.args, record.exc_info = line["message"], None, None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._listener is None:  # the first record of this process
            self._listener = _Listener(self)
            self._listener.start()
        try:
            self.waiting.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - as logging has it
        self.dropped += 1

    def forked(self) -> None:
        # The thread that writes is the parent's, and so is what waits for it.
        self._listener = None
        self.waiting = self.queue = queue.Queue(self.capacity)

    def close(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()
        super().close()


class _Listener(logging.handlers.QueueListener):
    """On the other side: a daemon thread that writes, and may be held up by its stream."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self._waiting = handler.waiting
        self._reported = 0
        super().__init__(handler.waiting, _Writer(handler))

    def handle(self, record: logging.LogRecord) -> None:
        super().handle(record)
        self._report()

    def _report(self) -> None:
        lost = self._handler.dropped - self._reported
        if lost > 0:
            self._reported += lost
            text = "%d log records were dropped: more came than the stream took"
            record = logging.LogRecord("jetrt.logs", logging.WARNING, "", 0, text, (lost,), None)
            record.event, record.fields = "log_records_dropped", {"dropped": lost}
            super().handle(record)

    def stop(self) -> None:
        # The base class has no time limit, and cannot stop at all while the queue is full.
        thread: threading.Thread | None = self._thread
        if thread is None:
            return
        deadline = time.monotonic() + PATIENCE_S
        try:
            self._waiting.put(None, timeout=PATIENCE_S)  # its sentinel
        except queue.Full:
            return
        thread.join(max(0.0, deadline - time.monotonic()))
        if not thread.is_alive():
            self._report()


class _Writer(_StreamHandler):
    def __init__(self, handler: _Handler) -> None:
        super().__init__(handler.stream)
        self._handler = handler
        self.setFormatter(JsonFormatter())

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - as logging has it
        # A closed pipe, a full disk: nothing that logging could say would get there either.
        self._handler.failed += 1


# ------------------------------------------------------------------------------------------------------ which records

_lock = threading.Lock()
_open: list[_Handler] = []
#: Of the logger ``jetrt`` before the first handle.
_level_before = logging.NOTSET


def _number(level: str | int) -> int:
    names = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "WARN": 30, "ERROR": 40, "CRITICAL": 50}
    number = names.get(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"level is {level!r}; allowed: {', '.join(names)}, or a number above 0")
    return number


def _set_level() -> None:
    """Low enough for every handle, and for what is always written; never higher than the program had it."""
    _log.setLevel(_level_before)
    if _open:
        _log.setLevel(min(_log.getEffectiveLevel(), logging.WARNING, *(handler.lowest for handler in _open)))


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for handler in _open:
        handler.forked()


os.register_at_fork(after_in_child=_after_fork)
