"""How plans get under their names: publications that die on the way, full disks, and folders that cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from manifests import FILES, KEY, MANIFEST, PLAN, lock_once, names, put

import fakes
from jetrt.errors import EngineBuildError, ManifestError
from jetrt.provenance import (
    Manifest,
    Sha256Sidecar,
    build_once,
    publish,
    remove_leftovers,
    temporary_for,
    write_error,
)

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
