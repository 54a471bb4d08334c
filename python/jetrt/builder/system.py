"""Memory of the machine that builds: made free before (`--prepare-system`), limited where the GPU shares it, watched.

On a Jetson the CPU and the GPU share one memory, and pages that CUDA holds can be neither swapped nor reclaimed. What
helps a build there: drop the page cache, so that what it holds is free at once; `vm.swappiness` 100, so that other
programs' pages go to swap early; `vm.overcommit_memory` 1, so that the builder's large, mostly untouched mappings are
not refused. All three are settings of the whole machine and need root. The values are those that a fork of the GR00T
deployment scripts sets before it builds on an Orin NX.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import BuildOptionError
from ..platform import meminfo
from ..report import table

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = [
    "Change",
    "MemoryWatch",
    "SystemReport",
    "lazy_module_loading",
    "memory_limits",
    "prepared_system",
    "raise_oom_score",
]

#: Setting under /proc/sys/vm -> value while a build runs.
SETTINGS: Final = {"swappiness": "100", "overcommit_memory": "1"}
MIB: Final = 1 << 20

Ask = Callable[[str], bool]
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


# ------------------------------------------------------------------------------------------------- --prepare-system


@dataclass
class Change:
    """One thing that was to be changed."""

    name: str
    #: Values as the kernel shows them; ``None`` for what has none (the page cache) or cannot be read.
    before: str | None = None
    after: str | None = None
    #: "" if it was done.
    problem: str = ""
    restored: bool = False


@dataclass
class SystemReport:
    """What `--prepare-system` did. Sizes in bytes, from /proc/meminfo (MemFree)."""

    changes: list[Change] = field(default_factory=list)
    free_before: int | None = None
    free_after: int | None = None

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        rows = [[c.name, c.before or "", c.after or "", c.problem or "done"] for c in self.changes]
        rows.append(["free memory", _size(self.free_before), _size(self.free_after), ""])
        return table(["prepared", "before", "after", ""], rows)


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / MIB:.0f} MiB"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL)


def _ask(question: str) -> bool:
    print(question, end=" ", file=sys.stderr, flush=True)
    return input().strip().lower() in ("y", "yes")


@contextlib.contextmanager
def prepared_system(
    *,
    yes: bool = False,
    ask: Ask | None = None,
    say: Callable[[str], None] = print,
    run: Run = _run,
    root: str | os.PathLike[str] = "/",
    is_root: bool | None = None,
) -> Iterator[SystemReport]:
    """Frees memory for a build and puts the settings back at the end.

    It asks first, with the exact commands: `ask` gets the question, by default on the terminal; `yes` answers it.
    Commands run under `sudo -n`, which never asks for a password, unless this process is root. A command that fails is
    reported and the rest is done all the same.

    Raises `BuildOptionError`, with nothing changed, where nobody can be asked, the answer is no, or sudo refuses.
    """
    top = Path(root)
    sudo = [] if (os.geteuid() == 0 if is_root is None else is_root) else ["sudo", "-n"]
    report = SystemReport()
    changes = {name: Change(f"vm.{name}", before=_setting(top, name)) for name in SETTINGS}
    wanted = {name: value for name, value in SETTINGS.items() if changes[name].before not in (value, None)}

    drop = [*sudo, "sh", "-c", f"sync && echo 3 > {_vm(top, 'drop_caches')}"]
    setting = {name: [*sudo, *_write(top, name, value)] for name, value in wanted.items()}
    restoring = {name: [*sudo, *_write(top, name, changes[name].before or "")] for name in wanted}
    commands = [drop, *setting.values()]
    _permitted(commands, list(restoring.values()), yes=yes, ask=ask)
    if sudo:
        allowed = _tried(run, [*sudo, "true"])
        if allowed:
            raise _refused(f"sudo refuses without a password ({allowed}). Run `sudo -v` first", commands)

    report.free_before = meminfo(top).get("MemFree")
    report.changes += [dropped := Change("page cache"), *changes.values()]
    try:
        dropped.problem = _tried(run, drop)
        for name, change in changes.items():
            if name in setting:
                change.problem = _tried(run, setting[name])
            change.after = _setting(top, name)
            if not change.problem and change.after != SETTINGS[name]:
                change.problem = f"it does not have the value {SETTINGS[name]}"
        report.free_after = meminfo(top).get("MemFree")
        say(report.text())
        yield report
    finally:
        for name, command in restoring.items():
            change = changes[name]
            if _setting(top, name) == change.before:
                continue
            problem = _tried(run, command)
            change.restored = not problem and _setting(top, name) == change.before
            if change.restored:
                say(f"{change.name} is {change.before} again")
            else:
                problem = problem or f"it is {_setting(top, name)}"
                say(f"{change.name} could not be set back ({problem}). Run: {shlex.join(command)}")


def _permitted(commands: list[list[str]], restoring: list[list[str]], *, yes: bool, ask: Ask | None) -> None:
    if yes:
        return
    if ask is None:
        if not (sys.stdin and sys.stdin.isatty()):
            raise _refused("there is no terminal to ask on. Add --yes to allow it", commands)
        ask = _ask
    question = ["--prepare-system changes settings of the whole machine. It would run:", *_lines(commands)]
    if restoring:
        question += ["and after the build:", *_lines(restoring)]
    if not ask("\n".join([*question, "Do that? [y/N]"])):
        raise _refused("the answer was no", commands)


def _lines(commands: list[list[str]]) -> list[str]:
    return [f"  {shlex.join(command)}" for command in commands]


def _refused(why: str, commands: list[list[str]]) -> BuildOptionError:
    return BuildOptionError(
        "\n".join(
            [
                f"--prepare-system: {why}, leave the option out, or run these commands yourself. Nothing was changed.",
                *_lines(commands),
            ]
        ),
        option="--prepare-system",
    )


def _tried(run: Run, command: Sequence[str]) -> str:
    """Runs the command; "" or what went wrong."""
    try:
        done = run(command)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = (done.stderr or "").strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _vm(top: Path, name: str) -> str:
    return shlex.quote(str(top / "proc/sys/vm" / name))


def _write(top: Path, name: str, value: str) -> list[str]:
    return ["sh", "-c", f"echo {value} > {_vm(top, name)}"]


def _setting(top: Path, name: str) -> str | None:
    try:
        text = (top / "proc/sys/vm" / name).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return text if re.fullmatch(r"-?\d+", text, re.ASCII) else None  # it ends up in a command


def _kib(path: Path, name: str) -> int | None:
    """The bytes of a line `name: … kB`."""
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(encoding="ascii", errors="replace"), re.M | re.ASCII)
    except OSError:
        return None
    return int(match[1]) << 10 if match else None


# --------------------------------------------------------------------------------------------------- the child's memory


def memory_limits(available: int, *, low_memory: bool = False) -> dict[str, int]:
    """Bytes of TensorRT's pools WORKSPACE and TACTIC_DRAM on a GPU that shares the system's memory.

    TensorRT would take all of it for the one and 75 % for the other, what other programs hold included. `available` is
    MemAvailable. A quarter and a half of it, since the weights are held more than once at the peak; in low-memory mode
    256 and 512 MiB, which are the least otherwise too.
    """
    least = {"WORKSPACE": 256 * MIB, "TACTIC_DRAM": 512 * MIB}
    if low_memory:
        return least
    share = {"WORKSPACE": available // 4, "TACTIC_DRAM": available // 2}
    return {pool: max(share[pool] // MIB * MIB, least[pool]) for pool in least}


def lazy_module_loading(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with `CUDA_MODULE_LOADING=LAZY`: kernels are loaded when first used, which saves some 100 MiB.

    A value that is set already is kept.
    """
    return {"CUDA_MODULE_LOADING": "LAZY", **environment}


def raise_oom_score(pid: int, score: int = 1000, *, root: str | os.PathLike[str] = "/") -> bool:
    """Makes a process of this user the first one that the kernel kills when memory runs out; False if that failed.

    1000 is the highest: the build dies, and not the robot's other programs. Raising needs no privilege.
    """
    try:
        Path(root, f"proc/{pid}/oom_score_adj").write_text(str(score), encoding="ascii")
    except OSError:
        return False
    return True


class MemoryWatch:
    """Samples the memory of a process while it runs; what it knows outlives the process. Sizes in bytes.

    `with MemoryWatch(child.pid) as memory: …` samples in a thread; `sample()` does it once. ``None`` is unknown.
    """

    def __init__(self, pid: int, interval: float = 0.25, *, root: str | os.PathLike[str] = "/") -> None:
        self._process = Path(root, f"proc/{pid}")
        self._top = Path(root)
        self._interval = interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="jetrt-memory", daemon=True)
        #: Peak of resident memory, kept by the kernel itself (VmHWM): pages of libraries and mapped files included.
        self.peak_resident: int | None = None
        #: Largest sample of the proportional share (Pss): what is shared with other processes counts in part.
        self.peak_share: int | None = None
        #: Least MemAvailable of the machine, which tells of CUDA's memory too where the GPU shares it.
        self.least_available: int | None = None

    def sample(self, *, share: bool = True) -> None:
        """`share`: Pss as well; the kernel walks the page tables for it (milliseconds for gigabytes)."""
        self.peak_resident = _largest(self.peak_resident, _kib(self._process / "status", "VmHWM"))
        if share:
            self.peak_share = _largest(self.peak_share, _kib(self._process / "smaps_rollup", "Pss"))
        available = meminfo(self._top).get("MemAvailable")
        if available is not None:
            self.least_available = min(available, self.least_available or available)

    def _watch(self) -> None:
        count = 0
        while not self._ended.is_set():
            self.sample(share=count % 8 == 0)
            count += 1
            self._ended.wait(self._interval)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.sample(share=False)

    def to_mapping(self) -> dict[str, int | None]:
        return {
            "peak_host_bytes": self.peak_resident,
            "peak_share_bytes": self.peak_share,
            "least_available_bytes": self.least_available,
        }


def _largest(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)
