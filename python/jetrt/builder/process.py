"""Runs a job of `jobs` in a child process: what it reports, how it died, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import errors
from ..errors import BuildCrashError, EngineBuildError, JetrtError
from .arrays import Array
from .frames import FrameError, Link, Message
from .system import MemoryWatch, raise_oom_score

__all__ = ["Answer", "Ask", "Watcher", "run_job"]

#: How long a child that was asked to stop may take before it is killed.
_GRACE = 0.8
_LAST_LINES = 40
_LONGEST_LINE = 1 << 16
#: How long one that closed its pipe may take to end: a core dump of gigabytes is written meanwhile.
_LINGER = 60.0


class Watcher(Protocol):
    """Is told what a child does (`progress.Reporter`)."""

    def event(self, message: Message) -> None: ...
    def tick(self, seconds: float) -> None: ...


Ask = Callable[[Message], tuple[Message, Mapping[str, Array]]]


@dataclass
class Answer:
    result: dict[str, Any]
    arrays: dict[str, Array]
    #: TensorRT's log: (level of `logging`, line).
    log: list[tuple[int, str]]
    seconds: float
    #: `MemoryWatch.to_mapping`.
    memory: dict[str, int | None]
    #: Seconds of each phase, in order.
    phases: dict[str, float] = field(default_factory=dict)


def run_job(
    job: str,
    request: Message,
    arrays: Mapping[str, Array] | None = None,
    *,
    timeout: float | None = None,
    ask: Ask | None = None,
    watcher: Watcher | None = None,
    library: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """Runs a job and waits for it.

    `ask` answers the child's questions (calibration batches). `library` is libnvinfer's path: its folder comes first in
    the child's LD_LIBRARY_PATH, where TensorRT before 10.16 looks for its builder resources. Raises what the job
    raised, and `BuildCrashError` when the child died: crash, out of memory, killed, timeout, Ctrl-C.
    """
    with _started(library, environment) as child:
        return _Conversation(child, job, watcher, ask, timeout).run({"job": job, **request}, arrays)


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    link: Link
    incoming: int
    #: What it printed to its standard streams, the last lines.
    printed: deque[str]
    reader: threading.Thread


#: Where this very package lies; a child that would not find it by itself finds it last.
_PACKAGE = str(Path(__file__).absolute().parents[2])
#: Without the working folder, in which any file could pass for a module.
_START = (
    "import sys; sys.path[:] = filter(None, sys.path); package = sys.argv.pop(1); "
    "package in sys.path or sys.path.append(package); from jetrt.builder.child import main; main()"
)


@contextlib.contextmanager
def _started(library: str | None, environment: Mapping[str, str] | None) -> Iterator[_Child]:
    here, theirs = os.pipe()
    their_input, ours = os.pipe()
    command = [sys.executable, "-c", _START, _PACKAGE, str(their_input), str(theirs), str(os.getpid())]
    process = None
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(their_input, theirs),
            env=_environment(library, environment),
            start_new_session=True,  # Ctrl-C in the terminal is for the parent, which decides
        )
    finally:
        os.close(theirs)
        os.close(their_input)
        if process is None:
            os.close(here)
            os.close(ours)
    raise_oom_score(process.pid)
    printed: deque[str] = deque(maxlen=_LAST_LINES)

    def drain() -> None:
        assert process.stdout is not None
        stdout = process.stdout
        for line in iter(lambda: stdout.readline(_LONGEST_LINE), b""):
            printed.append(line.decode(errors="replace").rstrip())

    reader = threading.Thread(target=drain, name="jetrt-child-output", daemon=True)
    reader.start()
    incoming, outgoing = os.fdopen(here, "rb", buffering=0), os.fdopen(ours, "wb")
    try:
        yield _Child(process, Link(incoming, outgoing), here, printed, reader)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        incoming.close()
        with contextlib.suppress(BrokenPipeError):  # what it did not read any more
            outgoing.close()
        reader.join(timeout=0.5)
        if process.stdout is not None and not reader.is_alive():  # a process of its own may still hold the other end
            process.stdout.close()


def _environment(library: str | None, more: Mapping[str, str] | None) -> dict[str, str]:
    found = dict(os.environ)
    found["PYTHONUNBUFFERED"] = "1"
    # Python gets TensorRT's lines when a call returns, too late for the last ones before a crash.
    found["JETRT_LOG_STDERR"] = "1"
    if library is not None:
        folder = str(Path(library).parent)
        others = [entry for entry in found.get("LD_LIBRARY_PATH", "").split(":") if entry and entry != folder]
        found["LD_LIBRARY_PATH"] = ":".join([folder, *others])
        found["JETRT_TENSORRT_PATH"] = library
    found.update(more or {})
    return found


class _Conversation:
    def __init__(
        self, child: _Child, job: str, watcher: Watcher | None, ask: Ask | None, timeout: float | None
    ) -> None:
        self.child, self.job, self.watcher, self.ask = child, job, watcher, ask
        self.begin = time.monotonic()
        self.end = None if timeout is None else self.begin + timeout
        self.timeout = timeout
        self.phase, self.since = "start", self.begin
        self.phases: dict[str, float] = {}
        self.lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.oom_kills = _oom_kills()

    def run(self, request: Message, arrays: Mapping[str, Array] | None) -> Answer:
        process = self.child.process
        sending = threading.Thread(target=self._send, args=(request, arrays), daemon=True)
        with MemoryWatch(process.pid) as memory:
            sending.start()
            try:
                message, found = self._listen()
            except KeyboardInterrupt:
                self._stop()
                raise self._died("interrupted", "it was stopped by Ctrl-C", None) from None
            except FrameError as error:
                self._stop()
                raise self._died("crash", f"its answer is broken: {error}", None) from None
            except EOFError:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_LINGER)
                if process.poll() is None:
                    self._stop()
                    raise self._died("crash", "it closed its pipe before it had answered", None) from None
                raise self._crashed(memory) from None
            process.wait()
            memory.peak_resident = max(memory.peak_resident or 0, message.get("peak") or 0) or None
        self._enter("")
        if message["event"] == "error":
            raise _raised(message["error"])
        log = [(level, line) for level, line in message["log"]]
        seconds = time.monotonic() - self.begin
        return Answer(message["result"], found, log, seconds, memory.to_mapping(), self.phases)

    def _send(self, request: Message, arrays: Mapping[str, Array] | None) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.child.link.send(request, arrays)

    def _listen(self) -> tuple[Message, dict[str, Array]]:
        with selectors.DefaultSelector() as selector:
            selector.register(self.child.incoming, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if self.end is not None and now >= self.end:
                    self._stop()
                    raise self._died("timeout", f"it did not end within {self.timeout:g} s", None)
                if self.watcher is not None:
                    self.watcher.tick(now - self.begin)
                wait = 0.2 if self.end is None else min(0.2, max(self.end - now, 0.0))
                if not selector.select(wait):
                    continue
                message, arrays = self.child.link.receive()
                event = message.get("event")
                if event in ("result", "error"):
                    return message, arrays
                if event == "ask":
                    assert self.ask is not None
                    answer = self.ask(message)
                    with contextlib.suppress(BrokenPipeError):  # its death is noticed where its answers are read
                        self.child.link.send(*answer)
                    continue
                if event == "phase":
                    self._enter(message["phase"])
                elif event == "log":
                    self.lines.append(message["line"])
                if self.watcher is not None:
                    self.watcher.event(message)

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        self.phases[self.phase] = round(self.phases.get(self.phase, 0.0) + now - self.since, 3)
        self.phase, self.since = phase or self.phase, now

    def _stop(self) -> None:
        process = self.child.process
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE)
        if process.poll() is None:
            process.kill()
            process.wait()

    def _crashed(self, memory: MemoryWatch) -> BuildCrashError:
        code = self.child.process.returncode
        least = memory.least_available
        room = "" if least is None else f"; at the least {least >> 20} MiB of the machine's memory were available"
        if code >= 0:
            return self._died("crash", f"it ended with status {code} before it had answered", None)
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        if -code == signal.SIGKILL:
            if _oom_kills() > self.oom_kills:
                return self._died("out of memory", f"the kernel killed it for lack of memory{room}", -code)
            return self._died("killed", f"it was killed (SIGKILL), by somebody or for lack of memory{room}", -code)
        return self._died("crash", f"it crashed ({name})", -code)

    def _died(self, how: str, what: str, number: int | None) -> BuildCrashError:
        self.child.reader.join(timeout=1)
        printed = [line for line in self.child.printed if line]
        sent = [part.rstrip() for line in self.lines for part in line.splitlines()]
        lines = [*(line for line in sent if line and line not in printed), *printed]
        seconds = time.monotonic() - self.begin
        step = {
            "out of memory": "Free memory, lower --workspace and --tactic-memory, or give --low-memory-mode.",
            "killed": "If nobody did: free memory, lower --workspace, or give --low-memory-mode.",
            "timeout": "Give it more time, or lower --opt-level.",
            "crash": "Try another --opt-level, or another TensorRT version.",
        }.get(how, "")
        whose = _WHAT.get(self.job, self.job)
        text = f"the process for {whose} ended after {seconds:.1f} s in phase {self.phase!r}: {what}."
        if step:
            text += f" {step}"
        if lines:
            text += "\nIts last lines:\n  " + "\n  ".join(lines[-10:])
        return BuildCrashError(
            text, how=how, signal=number, phase=self.phase, seconds=round(seconds, 3), log=list(lines)
        )


_WHAT = {
    "identify": "identifying this machine",
    "build": "the build",
    "run": "trying the plan",
    "trial": "running the plan repeatedly",
    "race": "timing plans",
    "reference": "the reference",
}


def _oom_kills() -> int:
    """How many processes the kernel killed for lack of memory so far, in this machine and this control group."""
    total = 0
    for path, key in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == key:
                    total += int(count)
    return total


def _raised(error: Message) -> Exception:
    """The child's exception, of the same class and with the same fields."""
    name = error["class"]
    if name == "OSError":
        return OSError(error["errno"], error["message"], error["filename"])
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if kind is None or not issubclass(kind, JetrtError):
        text = f"the child process failed: {error['message']}"
        return EngineBuildError(text, log=error.get("fields", {}).get("log"))
    raised: Exception = kind(error["message"], **error["fields"])
    return raised
