"""Cases in a pool of processes that may die: a crash or a hang costs the case that it happened in, and no other."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from cases import Case

Stage = Callable[[str], None]
START_SECONDS = 180.0  # imports, CUDA and the builder's 1.4 GB library, on all cores at once

# Fresh interpreters: nothing of the parent's threads and locks is inherited.
_context = multiprocessing.get_context("spawn")


class Executor(Protocol):
    """Runs one case after another in a process of its own. `folder` is for files; the pool removes it."""

    def __init__(self, folder: Path) -> None: ...
    def versions(self) -> dict[str, str]: ...
    def run(self, case: Case, stage: Stage) -> Result:
        """Says each stage before it begins ("parser", "shape", "builder", "run"); never raises for a bad case."""


@dataclass
class Result:
    #: "pass", "wrong" (ran, and differs), the stage that refused it ("parser", "shape", "builder", "type", "run"),
    #: or what became of the process: "crash", "timeout".
    status: str
    reason: str = ""
    error: str = ""  # class of the exception
    #: What the parity gate said of a wrong result: the first line of its refusal, or "passed". "": not asked.
    gate: str = ""
    seconds: float = 0.0

    @property
    def spoilt(self) -> bool:
        """After a failed kernel every later call in the process may fail too."""
        return self.status == "run" or "cuda" in self.reason.lower()


class PoolError(RuntimeError):
    """No worker can be started."""


def _work(make: Callable[[Path], Executor], pipe: connection.Connection, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)  # libraries print there too
    os.dup2(log, 2)
    executor = make(folder)
    pipe.send(("ready", executor.versions()))
    while (case := pipe.recv()) is not None:
        start = time.monotonic()
        result = executor.run(case, lambda stage: pipe.send(("stage", stage)))
        result.seconds = round(time.monotonic() - start, 3)
        pipe.send(("done", result))


class _Worker:
    def __init__(self, make: Callable[[Path], Executor]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="jetrt-onnx-")
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_work, args=(make, theirs, Path(self.folder.name)), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is an end of file here
        self.ready = self.gone = False
        self.versions: dict[str, str] = {}
        self.case: Case | None = None
        self.stage = "start"
        self.since = time.monotonic()

    @property
    def idle(self) -> bool:
        return self.ready and not self.gone and self.case is None

    def give(self, case: Case) -> bool:
        """False where the process is gone: the case was not begun."""
        try:
            self.pipe.send(case)
        except (BrokenPipeError, ConnectionResetError):
            self.end()
            return False
        self.case, self.stage, self.since = case, "start", time.monotonic()
        return True

    def hear(self, timeout: float) -> Result | None:
        """Reads what was sent; the result of the case if that has ended, one way or another."""
        try:
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "ready":
                    self.ready, self.versions = True, value
                elif kind == "stage":
                    self.stage = value
                else:
                    assert isinstance(value, Result)
                    return value
        except (EOFError, ConnectionResetError):
            return self._ended("crash", self.end(kill=False))
        limit = timeout if self.ready else START_SECONDS
        if not self.idle and time.monotonic() - self.since > limit:
            return self._ended("timeout", f"more than {limit:g} s", self.end())
        return None

    def _ended(self, status: str, *how: str) -> Result | None:
        if not self.ready:
            raise PoolError(f"a worker could not start ({status}: {', '.join(how)})")
        if self.case is None:
            return None
        seconds = round(time.monotonic() - self.since, 3)
        return Result(status, f"in stage {self.stage}: {', '.join(how)}", seconds=seconds)

    def end(self, kill: bool = True) -> str:
        """How the process ended, and the last line that it wrote."""
        self.gone = True
        if kill:
            self.process.kill()
        self.process.join()
        lines = (Path(self.folder.name) / "log").read_text(errors="replace").splitlines()
        self.pipe.close()
        self.folder.cleanup()
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {words}" if words else how


def run_all(
    cases: Iterable[Case],
    make: Callable[[Path], Executor],
    *,
    workers: int,
    timeout: float,
    budget: float | None = None,
    about: dict[str, Any] | None = None,
) -> Iterator[tuple[Case, Result]]:
    """Each case with its result, in the order in which they end.

    `timeout`: seconds for one case. `budget`: seconds after which no further case is begun. `make` must be importable
    by name in a fresh process. `about` gets what the executor says of its versions.

    Raises PoolError where a worker cannot be started.
    """
    waiting = deque(cases)
    begin = time.monotonic()
    crew: list[_Worker] = []

    def wanted() -> bool:
        return bool(waiting) and (budget is None or time.monotonic() - begin < budget)

    try:
        while wanted() or any(worker.case for worker in crew):
            free = sum(worker.case is None for worker in crew)
            for _ in range(min(workers - len(crew), len(waiting) - free) if wanted() else 0):
                crew.append(_Worker(make))
            connection.wait([worker.pipe for worker in crew], timeout=0.2)
            for worker in crew:
                result = worker.hear(timeout)
                if about is not None:
                    about.update(worker.versions)
                if result is not None:
                    assert worker.case is not None
                    yield worker.case, result
                    worker.case = None
                    if result.spoilt and not worker.gone:
                        worker.end()
                if worker.idle and wanted() and worker.give(waiting[0]):
                    waiting.popleft()
            crew = [worker for worker in crew if not worker.gone]
    finally:
        for worker in crew:
            if not worker.gone:
                worker.end()
