"""How plans get under their names: the lock, publications that die on the way, full disks, and who owns a name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manifests import MANIFEST, ORIN, PLAN, put

import fakes
from jetrt.errors import BuildOptionError, EngineBuildError, ManifestError
from jetrt.provenance import (
    EngineFile,
    Manifest,
    Sha256Sidecar,
    build_once,
    engine_lock,
    existing,
    publish,
    remove_leftovers,
    temporary_for,
    write_error,
)

KEY = MANIFEST.key
FILES = ["det.engine", "det.engine.json", "det.engine.sha256"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=fakes.environment(), stdout=subprocess.PIPE, text=True)


def lock_once(path: Path, **keywords: Any) -> None:
    with engine_lock(path, **keywords):
        pass


# The lock -------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from jetrt.provenance import engine_lock
with engine_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(HOLD, tmp_path / "det.engine")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_who_waits_knows_for_whom_and_a_killed_holder_frees_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    final = tmp_path / "det.engine"
    told: list[str] = []
    with pytest.raises(EngineBuildError, match=r"It did not end within 0\.2 s\. Wait longer, end that") as caught:
        lock_once(final, timeout=0.2, on_wait=told.append)
    text = rf"Process {holder.pid} \(since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\) is building {re.escape(str(final))}\."
    assert len(told) == 1
    assert re.fullmatch(text, told[0])
    assert str(caught.value).startswith(told[0])
    holder.send_signal(signal.SIGKILL)
    with engine_lock(final, timeout=5):
        assert names(tmp_path) == [".det.engine.lock"]
    assert names(tmp_path) == []


def test_a_holder_that_says_nothing_is_waited_for_too(tmp_path: Path) -> None:
    lock = tmp_path / ".det.engine.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for text in ("", "[]", "[" * 200, '{"pid": "\x1b", "since": 1}'):
            lock.write_text(text)
            with pytest.raises(EngineBuildError, match=r"^Another process is building .*det\.engine\. It did not end"):
                lock_once(tmp_path / "det.engine", timeout=0)


def test_the_lock_of_a_file_that_lost_its_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The holder before removes the file between the open and the lock of the next one.
    flock, calls = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            (tmp_path / ".det.engine.lock").unlink()
        if len(calls) == 2:
            (tmp_path / ".det.engine.lock").unlink()
            (tmp_path / ".det.engine.lock").touch()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with engine_lock(tmp_path / "det.engine"):
        assert len(calls) == 3


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(10):
            with engine_lock(tmp_path / "det.engine", timeout=60):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert names(tmp_path) == []


def test_a_name_that_no_manifest_could_hold_is_refused_before_the_build(tmp_path: Path) -> None:
    with pytest.raises(
        BuildOptionError, match=r'"a\\\\b\.engine" is not a file name without a folder\. Give another --engine\.'
    ):
        lock_once(tmp_path / "a\\b.engine")
    with pytest.raises(BuildOptionError, match=r"xxx: the name has 231 bytes and may have 230\. Give another"):
        lock_once(tmp_path / ("x" * 231))
    final = tmp_path / ("x" * 230)
    manifest = replace(MANIFEST, engine=replace(MANIFEST.engine, file=final.name))

    def make(temporary: Path) -> Manifest:
        temporary.write_bytes(PLAN)
        return manifest

    assert build_once(final, KEY, make) == (manifest, True)
    assert build_once(final, KEY, make) == (manifest, False)
    assert build_once(final, KEY, make, rebuild=True) == (manifest, True)


def test_an_error_inside_frees_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), engine_lock(tmp_path / "det.engine"):
        raise KeyboardInterrupt
    with engine_lock(tmp_path / "det.engine", timeout=0):
        pass


ONCE = """
import hashlib, os, sys, time
from dataclasses import replace
from pathlib import Path
from manifests import MANIFEST, PLAN
from jetrt.provenance import build_once
final = Path(sys.argv[1])
def make(temporary):
    (final.parent / f"built by {os.getpid()}").touch()
    time.sleep(0.5)
    temporary.write_bytes(PLAN)
    return MANIFEST
manifest, built = build_once(final, MANIFEST.key, make, timeout=60, on_wait=lambda text: print(text, flush=True))
print(manifest == MANIFEST, built)
"""


def test_two_processes_with_one_key_build_once(tmp_path: Path) -> None:
    final = tmp_path / "det.engine"
    processes = [start(ONCE, final) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(output[-1] for output in outputs) == ["True False", "True True"]
    (built,) = [p.pid for p, output in zip(processes, outputs, strict=True) if output[-1] == "True True"]
    assert names(tmp_path) == [f"built by {built}", *FILES]
    assert final.read_bytes() == PLAN


# Publication ----------------------------------------------------------------------------------------------------------


def test_what_is_published(tmp_path: Path) -> None:
    final = tmp_path / "det.engine"
    temporary = temporary_for(final)
    assert temporary == tmp_path / f".det.engine.{os.getpid()}.tmp"
    temporary.write_bytes(PLAN)
    publish(temporary, final, MANIFEST)
    assert names(tmp_path) == FILES
    assert final.read_bytes() == PLAN
    assert Manifest.read(final) == MANIFEST
    assert Sha256Sidecar.read(final) == Sha256Sidecar.of(final)


def test_a_plan_that_is_there_gets_its_companions(tmp_path: Path) -> None:
    final = tmp_path / "det.engine"
    final.write_bytes(PLAN)
    publish(None, final, replace(MANIFEST, origin="stamp", model=None, options=None, command=None))
    assert names(tmp_path) == FILES
    manifest = Manifest.read(final)
    assert manifest is not None
    assert manifest.origin == "stamp"


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        (
            replace(MANIFEST, engine=replace(MANIFEST.engine, bytes=5)),
            r"the manifest is for 'det\.engine' of 5 bytes, and this is to be 'det\.engine' and has 22 bytes",
        ),
        (replace(MANIFEST, engine=replace(MANIFEST.engine, file="rec.engine")), "the manifest is for 'rec"),
        (replace(MANIFEST, key=""), '/key: "" is not 64 lower-case hex digits'),
    ],
)
def test_a_manifest_of_another_plan_is_not_published(tmp_path: Path, manifest: Manifest, problem: str) -> None:
    final = tmp_path / "det.engine"
    temporary_for(final).write_bytes(PLAN)
    with pytest.raises(ManifestError, match=problem):
        publish(temporary_for(final), final, manifest)
    assert names(tmp_path) == [temporary_for(final).name]


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    final = tmp_path / "det.engine"
    put(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead = [f".det.engine{part}.{process.pid}.tmp" for part in ("", ".json", ".sha256")]
    alive = [
        f".det.engine.{os.getppid()}.tmp",
        ".det.engine.x.tmp",
        f".rec.engine.{process.pid}.tmp",
        ".det.engine.lock",
    ]
    for name in [*dead, *alive, temporary_for(final).name, f".det.engine.{10**30}.tmp"]:
        (tmp_path / name).touch()
    removed = remove_leftovers(final)
    assert sorted(p.name for p in removed) == sorted([*dead, temporary_for(final).name, f".det.engine.{10**30}.tmp"])
    assert names(tmp_path) == sorted([*alive, *FILES])


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def make(temporary: Path) -> Manifest:
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        build_once(tmp_path / "det.engine", KEY, make)
    assert names(tmp_path) == []


# Two configurations of the same size take turns under one name. What loads must be one of them, whole, with its own
# manifest; `state` does what loading does, the native comparison of the digest included.
TURNS = """
import collections, hashlib, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
from manifests import MANIFEST, ORIN
from jetrt.errors import PlanError
from jetrt.provenance import *

final = Path(sys.argv[1]) / "det.engine"
FILES = ["det.engine", "det.engine.json", "det.engine.sha256"]
PLANS = {name: random.Random(name).randbytes(100_000) for name in "ab"}
MANIFESTS = {
    name: replace(
        MANIFEST,
        key=hashlib.sha256(name.encode()).hexdigest(),
        engine=EngineFile("det.engine", hashlib.sha256(plan).hexdigest(), len(plan)),
        options={"log": name * 20_000},
    )
    for name, plan in PLANS.items()
}

def build(name):
    def make(temporary):
        temporary.write_bytes(PLANS[name])
        return MANIFESTS[name]
    build_once(final, MANIFESTS[name].key, make, overwrite=True, timeout=5)

def state():
    if not final.exists():
        return "absent"
    (name,) = [name for name, plan in PLANS.items() if plan == final.read_bytes()]  # never a half
    try:
        check_before_load(final, ORIN)
        sidecar = Sha256Sidecar.read(final)
        if sidecar is not None:
            sidecar.verify(final)
    except PlanError:
        return "refused"
    assert Manifest.read(final) == MANIFESTS[name], "a plan that loads with the manifest of another"
    return name

def clean():
    for path in final.parent.iterdir():
        path.unlink()

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid
"""

AT_ANY_MOMENT = """
seen = collections.Counter()
generator = random.Random(int(sys.argv[2]))

def forever():
    while True:
        build("a")
        build("b")

kills, longest = 0, 0.02
# On a busy machine it takes more, and longer, until some of them came far.
while kills < 200 or not {"a", "b"} <= set(seen):
    if kills % 4 == 0:
        clean()
    kills += 1
    longest *= 1 if kills < 200 else 1.05
    pid = child(forever)
    time.sleep(generator.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), status
    seen[state()] += 1
build("a")
assert state() == "a"
assert sorted(path.name for path in final.parent.iterdir()) == FILES
print(dict(seen))
"""

AT_EVERY_STEP = """
def killed_at(step):
    # Every file that is opened, renamed, removed, listed, cut or locked is a step.
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.truncate", "os.scandir", "os.listdir", "fcntl.flock"):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
    sys.addaudithook(hook)
    build("b")

for before in ("absent", "a"):
    seen = []
    for step in range(1000):
        clean()
        if before == "a":
            build("a")
        _, status = os.waitpid(child(lambda: killed_at(step)), 0)
        seen.append(state())
        build("b")
        assert state() == "b"
        assert sorted(path.name for path in final.parent.iterdir()) == FILES
        if not os.WIFSIGNALED(status):
            break
    print(*seen)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    done = fakes.run_python(TURNS + AT_ANY_MOMENT, str(tmp_path), str(time.time_ns()))
    counts = dict(re.findall(r"'(\w+)': (\d+)", done.stdout))
    assert sum(map(int, counts.values())) >= 200
    assert {"a", "b"} <= set(counts)


def test_killed_at_every_step(tmp_path: Path) -> None:
    first, second = (
        line.split() for line in fakes.run_python(TURNS + AT_EVERY_STEP, str(tmp_path)).stdout.splitlines()
    )
    assert len(first) > 15
    # A new plan is not there until it is complete. An old one is complete, then refused for two renames, then new.
    assert first == sorted(first, key=["absent", "b"].index)
    assert second == sorted(second, key=["a", "refused", "b"].index)
    assert second.count("refused") >= 2


# Disks and folders ----------------------------------------------------------------------------------------------------

FULL = """
import os, sys
from pathlib import Path
from manifests import MANIFEST, PLAN
from jetrt.errors import EngineBuildError
from jetrt.provenance import *
final = Path(sys.argv[1]) / "det.engine"
def make(temporary):
    temporary.write_bytes(PLAN)
    with open(final.parent / "rest", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            print(error.strerror)
    return MANIFEST
try:
    build_once(final, MANIFEST.key, make)
except EngineBuildError as error:
    print(type(error).__name__, error)
print(sorted(os.listdir(final.parent)))
"""


def in_small_disk(folder: Path, options: str, code: str) -> list[str]:
    """Runs code in a mount namespace where `folder` is a disk of its own."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed")
    mount = f"mount -t tmpfs -o {options} tmpfs '{folder}'"
    if subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("this process may not mount a small disk")
    command = [unshare, "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=fakes.environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_full_disk(tmp_path: Path) -> None:
    strerror, message, left = in_small_disk(tmp_path, "size=64k", FULL)
    assert strerror == "No space left on device"
    size = len(MANIFEST.to_json().encode())
    assert re.fullmatch(
        rf"EngineBuildError {re.escape(str(tmp_path))}/\.det\.engine\.json\.\d+\.tmp: no room on the disk: "
        rf"{size} bytes are needed; 0 bytes are free in {re.escape(str(tmp_path))}\. Make room, or give another "
        r"folder\.",
        message,
    )
    assert left == "['rest']"


def test_read_only_folder(tmp_path: Path) -> None:
    (message, left) = in_small_disk(tmp_path, "ro", FULL)
    assert message == (
        f"EngineBuildError {tmp_path}/.det.engine.lock: {tmp_path} cannot be written (Read-only file system). "
        "Change its rights, or give another folder."
    )
    assert left == "[]"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"the folder .*/new does not exist\. Create it, or give another one"):
        lock_once(tmp_path / "new" / "det.engine")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, r"no room on the disk: 7 bytes are needed; \d+ bytes are free in "),
        (errno.EDQUOT, r"no room on the disk: 7 bytes are needed; \d+ bytes are free in "),
        (errno.EFBIG, "larger than a file may be here: 7 bytes are needed; see `ulimit -f`"),
        (errno.EACCES, r"cannot be written \(Permission denied\)\. Change its rights"),
        (errno.EIO, "cannot be written: Input/output error"),
    ],
)
def test_errors_of_writing(tmp_path: Path, code: int, text: str) -> None:
    path = tmp_path / "det.engine"
    error = write_error(OSError(code, os.strerror(code)), path, needed=7)
    assert type(error) is EngineBuildError
    assert str(error).startswith(f"{path}: ")
    assert re.search(text, str(error))
    assert error.path == str(path)
    assert "needed" not in str(write_error(OSError(code, os.strerror(code)), path))
    assert "free space is unknown" in str(write_error(OSError(errno.ENOSPC, ""), tmp_path / "no" / "x"))


@pytest.mark.parametrize("failing", range(5))
def test_a_disk_that_fails_while_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    # Delayed allocation reports a full disk here.
    final = tmp_path / "det.engine"
    fsync, calls = os.fsync, []

    def fail(fd: int) -> None:
        calls.append(fd)
        if len(calls) == failing + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    def make(temporary: Path) -> Manifest:
        temporary.write_bytes(PLAN)
        return MANIFEST

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EngineBuildError, match="no room on the disk"):
        build_once(final, KEY, make)
    left = names(tmp_path)
    assert left == ([], [], [], FILES[1:], FILES)[failing]
    manifest, built = build_once(final, KEY, make)
    assert (manifest, built) == (MANIFEST, failing < 4)
    assert names(tmp_path) == FILES


def test_a_link_in_place_of_a_temporary_is_not_followed(tmp_path: Path) -> None:
    final, precious = tmp_path / "det.engine", tmp_path / "precious"
    precious.write_text("mine")
    temporary_for(final).write_bytes(PLAN)
    temporary_for(Manifest.path_for(final)).symlink_to(precious)
    with pytest.raises(EngineBuildError, match=r"\.det\.engine\.json\.\d+\.tmp: cannot be written: Too many levels"):
        publish(temporary_for(final), final, MANIFEST)
    assert precious.read_text() == "mine"


# Who owns a name ------------------------------------------------------------------------------------------------------


def test_absent_and_same(tmp_path: Path) -> None:
    final = tmp_path / "det.engine"
    assert existing(final, KEY) == "absent"
    put(tmp_path)
    assert existing(final, KEY) == "same"
    assert existing(final, KEY, overwrite=True) == "same"
    Sha256Sidecar.path_for(final).unlink()
    assert existing(final, KEY) == "same"
    final.unlink()
    assert existing(final, "2" * 64) == "absent"  # what an interrupted build left


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: e.write_bytes(PLAN[:-1] + b"!"),
        lambda e: e.write_bytes(PLAN + b"!"),
        lambda e: Sha256Sidecar("0" * 64, e.name).write(e),
        lambda e: Sha256Sidecar.path_for(e).write_text("?"),
    ],
)
def test_a_damaged_plan_of_the_same_key_is_built_again(
    tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    final = put(tmp_path)
    damage(final)
    with caplog.at_level(logging.WARNING, "jetrt.provenance"):
        assert existing(final, KEY) == "absent"
    assert caplog.messages == [
        f"{final} does not fit its manifest (damaged, or its build was interrupted) and is built again"
    ]


def test_two_configurations_with_one_name_are_refused(tmp_path: Path) -> None:
    final = put(tmp_path)
    wanted: dict[str, Any] = {
        "options": {"precision": "int8", "opt_level": 3, "shapes": {"x": (1, 2)}},
        "model_sha256": "2" * 64,
        "machine": replace(ORIN, sm_count=8),
    }
    with pytest.raises(EngineBuildError) as caught:
        existing(final, "2" * 64, **wanted)
    assert (
        str(caught.value)
        == f"""\
{final} is there already and was built from something else:
                there                                                               wanted
  model sha256  "{"1" * 64}"  "{"2" * 64}"
  precision     "fp16"                                                              "int8"
  shapes        null                                                                {{"x": [1, 2]}}
  sm_count      16                                                                  8
Give another --engine, or replace it with --overwrite (overwrite=True)."""
    )
    assert caught.value.path == str(final)
    assert existing(final, "2" * 64, **wanted, overwrite=True) == "absent"
    with pytest.raises(EngineBuildError, match=r"\n  key  0{64}  2{64}\n"):
        existing(final, "2" * 64)


def test_a_name_that_nobody_can_explain_is_not_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "det.engine"
    final.write_bytes(PLAN)
    with pytest.raises(
        EngineBuildError, match=r"is there already and has no manifest, so that nothing says what it was"
    ):
        existing(final, KEY)
    Manifest.path_for(final).write_text("{")
    with pytest.raises(
        EngineBuildError, match=r"has a manifest that cannot be used \(no JSON: Expecting property name"
    ):
        existing(final, KEY)
    assert existing(final, KEY, overwrite=True) == "absent"


def test_a_build_under_a_name_that_is_taken_is_not_begun(tmp_path: Path) -> None:
    final = put(tmp_path)
    called = []
    with pytest.raises(EngineBuildError, match="was built from something else"):
        build_once(final, "2" * 64, called.append, options={})  # type: ignore[arg-type]
    assert called == []
    assert names(tmp_path) == FILES

    def make(temporary: Path) -> Manifest:
        temporary.write_bytes(b"new")
        engine = EngineFile("det.engine", hashlib.sha256(b"new").hexdigest(), 3)
        return replace(MANIFEST, key="2" * 64, engine=engine)

    manifest, built = build_once(final, "2" * 64, make, overwrite=True)
    assert built
    assert manifest == Manifest.read(final)
    assert final.read_bytes() == b"new"
