"""Shows what a build is doing: title, phase, TensorRT's own phase and its step, elapsed time. Never a percentage.

TensorRT may report nothing for minutes (seen: 110 of the 111 s of a build), and nobody knows how many phases will come.
So what is shown is what was reported, and a clock that goes on.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from ..errors import BuildOptionError
from .frames import Message

__all__ = ["KINDS", "Reporter", "reporter"]

KINDS = ("auto", "terminal", "notebook", "plain", "none")
Clock = Callable[[], float]
#: `IPython.display.display`.
Display = Callable[..., Any]


@dataclass
class _Part:
    """A phase of TensorRT that has begun and not ended."""

    parent: str
    steps: int
    done: int = 0

    def text(self, name: str) -> str:
        # TensorRT counts steps from 0 and reports those that are done; a phase that began is at its first one.
        return f"{name} (step {min(self.done + 1, self.steps)} of {self.steps})" if self.steps > 1 else name


class Reporter:
    """Follows a build (it is a `process.Watcher`) and shows nothing; the classes below show it.

    Leaving it as a context manager clears what it rewrites on the screen. It is for one thread.
    """

    #: Seconds between two looks at what goes on.
    _interval = float("inf")

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._begin = self._drawn_at = clock()
        self._title = self._phase = self._shown = ""
        self._elapsed = 0.0
        #: In the order in which they began.
        self._parts: dict[str, _Part] = {}
        self._warnings = self._errors = 0
        self._broken = False

    def title(self, text: str) -> None:
        """What is done from now on, such as "building m.engine, level 3"; its time begins at 0."""
        self._title, self._phase, self._elapsed = text, "", 0.0
        self._parts.clear()
        self._draw()

    def note(self, text: str) -> None:
        """Lines that stay."""
        self._print(_clean(text, keep="\n"))

    def done(self, text: str) -> None:
        """Lines that stay, with the time since the reporter was made and the number of warnings."""
        self.note(f"{text} ({self._numbers(self._clock() - self._begin)})")

    def clear(self) -> None:
        """Takes the line that is rewritten off the screen, before somebody else writes there (a question)."""

    def event(self, message: Message) -> None:
        """A message of the child: phase, progress or log. Lines of the log are only counted: the result has them."""
        if message["event"] == "phase":
            self._phase = message["phase"]
            self._parts.clear()
        elif message["event"] == "log":
            self._errors += message["level"] >= logging.ERROR
            self._warnings += logging.WARNING <= message["level"] < logging.ERROR
        elif message["event"] == "progress":
            self._progress(message["kind"], message["phase"], message["parent"], message["number"])

    def tick(self, seconds: float) -> None:
        """The child runs, since this many seconds. Called some times a second."""
        self._elapsed = seconds
        if self._clock() - self._drawn_at >= self._interval:
            self._draw()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def _progress(self, kind: str, name: str, parent: str, number: int) -> None:
        if kind == "start":
            self._parts.pop(name, None)
            self._parts[name] = _Part(parent, number)
        elif name in self._parts and kind == "step":
            self._parts[name].done = max(self._parts[name].done, number + 1)
        elif name in self._parts:
            over = {name}  # and what began inside it, reported or not
            for inner, part in self._parts.items():
                if part.parent in over:
                    over.add(inner)
            self._parts = {inner: part for inner, part in self._parts.items() if inner not in over}

    def _status(self) -> str:
        """One line; the numbers come first and the innermost phase before the outer ones, since the end may be cut."""
        chain: list[str] = []
        wanted = next(reversed(self._parts), "")
        for name, part in reversed(self._parts.items()):
            if name == wanted:
                chain.append(part.text(name))
                wanted = part.parent
        what = ": ".join(filter(None, (self._title, self._phase, " in ".join(chain))))
        return _clean(f"[{self._numbers(self._elapsed)}] {what}".rstrip())

    def _numbers(self, seconds: float) -> str:
        counts = ((self._warnings, "warning"), (self._errors, "error"))
        return ", ".join([_time(seconds), *(f"{n} {word}{'s' * (n > 1)}" for n, word in counts if n)])

    def _draw(self) -> None:
        """Shows `_status`."""

    def _print(self, text: str) -> None:
        """Shows lines that stay."""

    def _safely(self, show: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._broken:
            return None
        try:
            return show(*args, **options)
        except Exception:  # closed, a broken pipe, anything: what shows a build does not end it
            self._broken = True
            return None


class _Plain(Reporter):
    """Lines for a log: one when something begins, and one every 10 s."""

    _interval = 10.0

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        super().__init__(clock)
        self._stream = stream

    def event(self, message: Message) -> None:
        super().event(message)
        if message["event"] == "phase":
            self._draw()

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        self._write(self._status() + "\n")

    def _print(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        self._safely(self._stream.write, self._encodable(text))
        self._safely(self._stream.flush)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


class _Terminal(_Plain):
    """One line, rewritten in place."""

    _interval = 0.1

    def __init__(self, stream: TextIO, clock: Clock, width: Callable[[], int]) -> None:
        super().__init__(stream, clock)
        self._width = width

    def event(self, message: Message) -> None:
        Reporter.event(self, message)  # the next tick shows it

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        # A full line would wrap in some terminals.
        text = _cut(self._encodable(self._status()), self._width() - 1)
        if text != self._shown:
            self._write(f"\r{text}\x1b[K")
            self._shown = text

    def _print(self, text: str) -> None:
        self.clear()
        super()._print(text)

    def clear(self) -> None:
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = ""


class _Notebook(Reporter):
    """An output of the cell, updated in place. Plain text: names of others must not become HTML."""

    _interval = 0.5

    def __init__(self, display: Display, clock: Clock) -> None:
        super().__init__(clock)
        self._display = display
        self._handle: Any = None

    def done(self, text: str) -> None:
        self.clear()
        super().done(text)

    def clear(self) -> None:
        self._update("")

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        self._update(self._status())

    def _update(self, text: str) -> None:
        if text == self._shown:
            return
        if self._handle is None:
            self._handle = self._safely(self._display, {"text/plain": text}, raw=True, display_id=True)
        else:
            self._safely(self._handle.update, {"text/plain": text}, raw=True)
        self._shown = text

    def _print(self, text: str) -> None:
        self._safely(self._display, {"text/plain": text}, raw=True)


def reporter(
    kind: str = "auto",
    stream: TextIO | None = None,
    *,
    clock: Clock = time.monotonic,
    width: Callable[[], int] | None = None,
    display: Display | None = None,
) -> Reporter:
    """What shows a build.

    "auto" is the notebook in an IPython kernel, the terminal where `stream` (sys.stderr) is one, else plain lines. What
    is asked for and is not there becomes plain lines too. `clock` gives seconds, `width` the terminal's columns,
    `display` is IPython's function. Raises `BuildOptionError` for an unknown kind.
    """
    if kind not in KINDS:
        raise BuildOptionError(
            f"progress {kind!r} is unknown: use {', '.join(KINDS)}.", option="progress", found=kind, allowed=KINDS
        )
    if kind == "none":
        return Reporter(clock)
    if kind in ("auto", "notebook"):
        show = display or _kernel_display()
        if show is not None:
            return _Notebook(show, clock)
    found = stream if stream is not None else sys.stderr
    if found is None:  # a Python without a console
        return Reporter(clock)
    if kind in ("auto", "terminal") and _is_terminal(found):
        return _Terminal(found, clock, width or (lambda: _columns(found)))
    return _Plain(found, clock)


def _kernel_display() -> Display | None:
    """IPython's `display` if this is its kernel; a process that is one has imported IPython already."""
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    if get is None or not hasattr(get(), "kernel"):  # IPython in a terminal has no kernel
        return None
    show: Display = importlib.import_module("IPython.display").display
    return show


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):  # closed; not quite a stream
        return False


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # some say 0
    except (OSError, ValueError):
        return 80


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _clean(text: str, keep: str = "") -> str:
    """Names come from files of others, and a terminal obeys what it is sent."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, columns: int) -> str:
    """The beginning of `text` that takes no more columns than that."""
    used = 0
    for index, c in enumerate(text):
        used += 2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1
        if used > columns:
            return text[:index]
    return text
