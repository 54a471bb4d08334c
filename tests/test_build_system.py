"""`jetrt.builder.system`: preparing the machine for a build, limits of memory, watching a process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt.builder import system
from jetrt.builder.system import MIB, MemoryWatch, lazy_module_loading, memory_limits, prepared_system, raise_oom_score
from jetrt.errors import BuildOptionError


@pytest.fixture
def top(tmp_path):
    """A /proc of our own, with the values of a fresh Jetson."""
    vm = tmp_path / "proc" / "sys" / "vm"
    vm.mkdir(parents=True)
    for name, value in {"swappiness": "60", "overcommit_memory": "0", "drop_caches": "0"}.items():
        (vm / name).write_text(f"{value}\n")
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal:  8000000 kB\nMemFree:   1024000 kB\nMemAvailable: 2048000 kB\n"
    )
    return tmp_path


class Runner:
    """Runs the commands for real, on the files of `top`, and without sudo. `refuse`: words in commands that fail."""

    def __init__(self, *refuse: str) -> None:
        self.commands: list[str] = []
        self.refuse = refuse

    def __call__(self, command):
        self.commands.append(shlex.join(command))
        for word in self.refuse:
            if word in self.commands[-1]:
                return subprocess.CompletedProcess(command, 1, "", f"first line\n{word}: permission denied\n")
        if command[:2] == ["sudo", "-n"]:
            command = command[2:]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def values(top):
    return {name: (top / "proc/sys/vm" / name).read_text().strip() for name in (*system.SETTINGS, "drop_caches")}


PREPARED = {"swappiness": "100", "overcommit_memory": "1", "drop_caches": "3"}
BACK = {"swappiness": "60", "overcommit_memory": "0", "drop_caches": "3"}


def test_prepared_and_put_back(top):
    run, said, asked = Runner(), [], []
    vm = top / "proc/sys/vm"

    def ask(question):
        asked.append(question)
        assert values(top)["swappiness"] == "60"  # nothing before the answer
        return True

    with prepared_system(ask=ask, say=said.append, run=run, root=top, is_root=False) as report:
        assert values(top) == PREPARED
    assert values(top) == BACK
    commands = [f"sudo -n sh -c {shlex.quote(text)}" for text in (
        f"sync && echo 3 > {vm}/drop_caches", f"echo 100 > {vm}/swappiness", f"echo 1 > {vm}/overcommit_memory",
        f"echo 60 > {vm}/swappiness", f"echo 0 > {vm}/overcommit_memory",
    )]  # fmt: skip
    assert run.commands == ["sudo -n true", *commands]
    # What was asked for is what was run, to the letter.
    (question,) = asked
    lines = question.splitlines()
    assert lines[0] == "--prepare-system changes settings of the whole machine. It would run:"
    assert [line.strip() for line in lines if line.startswith("  ")] == commands
    assert lines[4] == "and after the build:"
    assert lines[-1] == "Do that? [y/N]"
    assert said[0].splitlines() == [
        "prepared              before    after",
        "page cache                                done",
        "vm.swappiness         60        100       done",
        "vm.overcommit_memory  0         1         done",
        "free memory           1000 MiB  1000 MiB",
    ]
    assert said[1:] == ["vm.swappiness is 60 again", "vm.overcommit_memory is 0 again"]
    assert all(change["restored"] for change in report.to_mapping()["changes"][1:])
    json.dumps(report.to_mapping())


def interrupted(top, run):
    with prepared_system(yes=True, say=str, run=run, root=top, is_root=True):
        assert values(top) == PREPARED
        raise KeyboardInterrupt


def test_put_back_after_an_error(top):
    with pytest.raises(KeyboardInterrupt):
        interrupted(top, Runner())
    assert values(top) == BACK


def test_put_back_when_interrupted_half_way(top):
    class Impatient(Runner):
        def __call__(self, command):
            done = super().__call__(command)
            if "swappiness" in self.commands[-1] and len(self.commands) == 2:
                raise KeyboardInterrupt
            return done

    with pytest.raises(KeyboardInterrupt):
        interrupted(top, Impatient())
    assert values(top) == BACK


def test_root_needs_no_sudo(top):
    run = Runner()
    with prepared_system(yes=True, say=str, run=run, root=top, is_root=True):
        pass
    assert not any(command.startswith("sudo") for command in run.commands)


def test_what_is_set_already_is_left_alone(top):
    (top / "proc/sys/vm/swappiness").write_text("100\n")
    (top / "proc/sys/vm/overcommit_memory").write_text("1\n")
    run = Runner()
    with prepared_system(yes=True, say=str, run=run, root=top, is_root=True):
        pass
    assert len(run.commands) == 1
    assert "drop_caches" in run.commands[0]


def refused(top, run=None, **options):
    before = values(top)
    with (
        pytest.raises(BuildOptionError) as caught,
        prepared_system(say=pytest.fail, run=run or pytest.fail, root=top, is_root=False, **options),
    ):
        pytest.fail("must not get here")
    assert values(top) == before
    assert caught.value.option == "--prepare-system"
    message = str(caught.value)
    assert f"  sudo -n sh -c 'echo 100 > {top}/proc/sys/vm/swappiness'" in message.splitlines()
    assert "leave the option out, or run these commands yourself. Nothing was changed." in message
    return message


def test_no_terminal(top, monkeypatch):
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        assert refused(top).startswith("--prepare-system: there is no terminal to ask on. Add --yes to allow it, leave")
    monkeypatch.setattr("sys.stdin", None)
    refused(top)


def test_no(top):
    assert refused(top, ask=lambda question: False).startswith("--prepare-system: the answer was no,")


@pytest.mark.parametrize(("answer", "allowed"), [("y", True), ("Yes ", True), ("", False), ("n", False), ("ja", False)])
def test_the_terminal_is_asked(top, monkeypatch, capsys, answer, allowed):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda: answer)
    if allowed:
        with prepared_system(say=str, run=Runner(), root=top, is_root=False):
            assert values(top) == PREPARED
    else:
        refused(top)
    assert capsys.readouterr().err.endswith("Do that? [y/N] ")


def test_sudo_wants_a_password(top):
    message = refused(top, Runner("sudo -n true"), yes=True)
    assert message.startswith(
        "--prepare-system: sudo refuses without a password (sudo -n true: permission denied). Run `sudo -v` first, "
    )


def test_there_is_no_sudo(top):
    def run(command):
        raise FileNotFoundError(2, "No such file or directory", "sudo")

    assert "sudo refuses without a password ([Errno 2] No such file" in refused(top, run, yes=True)


def test_one_failure_does_not_stop_the_rest(top):
    said = []
    run = Runner("swappiness")
    with prepared_system(yes=True, say=said.append, run=run, root=top, is_root=True) as report:
        assert values(top) == {**PREPARED, "swappiness": "60"}
    assert [change.problem for change in report.changes] == ["", "swappiness: permission denied", ""]
    assert "vm.swappiness         60        60        swappiness: permission denied" in said[0]
    assert said[1:] == ["vm.overcommit_memory is 0 again"]


def test_a_write_that_has_no_effect_is_seen(top):
    def run(command):
        return subprocess.CompletedProcess(command, 0, "", "")

    with prepared_system(yes=True, say=str, run=run, root=top, is_root=True) as report:
        pass
    assert [change.problem for change in report.changes] == [
        "", "it does not have the value 100", "it does not have the value 1",
    ]  # fmt: skip


def test_what_cannot_be_put_back_is_said(top):
    said = []
    run = Runner("echo 60", "echo 0")
    with prepared_system(yes=True, say=said.append, run=run, root=top, is_root=True) as report:
        pass
    path = top / "proc/sys/vm/swappiness"
    assert said[1] == (
        f"vm.swappiness could not be set back (echo 60: permission denied). Run: sh -c 'echo 60 > {path}'"
    )
    assert not report.changes[1].restored


def test_a_kernel_without_the_files(tmp_path):
    with prepared_system(yes=True, say=str, run=Runner(), root=tmp_path, is_root=True) as report:
        pass
    cache, swap, _ = report.changes
    assert "No such file" in cache.problem or "nonexistent" in cache.problem
    assert swap.problem == "it does not have the value 100"
    assert "free memory           unknown  unknown" in report.text()


def test_a_hostile_value_is_no_command(top):
    (top / "proc/sys/vm/swappiness").write_text("60; touch /tmp/owned\n")
    run = Runner()
    with prepared_system(yes=True, say=str, run=run, root=top, is_root=True):
        pass
    assert not any("owned" in command for command in run.commands)


@given(st.integers(0, 1 << 40))
def test_limits_leave_room(available):
    limits = memory_limits(available)
    assert set(limits) == {"WORKSPACE", "TACTIC_DRAM"}
    for pool, least, part in (("WORKSPACE", 256, 4), ("TACTIC_DRAM", 512, 2)):
        assert limits[pool] % MIB == 0
        assert limits[pool] >= least * MIB
        assert limits[pool] == least * MIB or available / part - MIB < limits[pool] <= available / part
    assert memory_limits(available, low_memory=True) == {"WORKSPACE": 256 * MIB, "TACTIC_DRAM": 512 * MIB}


def test_limits_of_an_orin_nano():
    assert memory_limits(6 << 30) == {"WORKSPACE": 1536 * MIB, "TACTIC_DRAM": 3072 * MIB}


def test_lazy_loading():
    assert lazy_module_loading({"A": "1"}) == {"A": "1", "CUDA_MODULE_LOADING": "LAZY"}
    assert lazy_module_loading({"CUDA_MODULE_LOADING": "EAGER"}) == {"CUDA_MODULE_LOADING": "EAGER"}


# Processes of our own -------------------------------------------------------------------------------------------------

CHILD = """
import sys
block = bytearray(64 << 20)
for i in range(0, len(block), 4096): block[i] = 1
del block
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.communicate()


def test_the_child_is_killed_first(child, tmp_path):
    assert raise_oom_score(child.pid)
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text() == "1000\n"
    assert not raise_oom_score(child.pid, root=tmp_path)


def test_memory_of_a_child(child):
    with MemoryWatch(child.pid, interval=0.01) as memory:
        child.communicate()
    # What was freed before the first sample is in the kernel's peak, and all of it outlives the process.
    assert 64 << 20 < memory.peak_resident < 200 << 20
    assert 0 < memory.peak_share < memory.peak_resident
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < memory.least_available < total
    assert memory.to_mapping() == {
        "peak_host_bytes": memory.peak_resident,
        "peak_share_bytes": memory.peak_share,
        "least_available_bytes": memory.least_available,
    }


def test_the_extremes_are_kept(tmp_path):
    process = tmp_path / "proc" / "7"
    process.mkdir(parents=True)
    memory = MemoryWatch(7, root=tmp_path)
    memory.sample()
    assert set(memory.to_mapping().values()) == {None}
    for peak, share, available in ((500, 400, 90), (900, 300, 20), (900, 350, 60)):
        (process / "status").write_text(f"Name:\tx\nVmHWM:\t {peak} kB\nVmRSS:\t 1 kB\n")
        (process / "smaps_rollup").write_text(f"Rss: 9999 kB\nPss:  {share} kB\nPss_Anon: 5000 kB\n")
        (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {available} kB\n")
        memory.sample()
    assert (memory.peak_resident, memory.peak_share, memory.least_available) == (900 << 10, 400 << 10, 20 << 10)
