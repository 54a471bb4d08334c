"""Who may write a plan: the lock, and what has the name already."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manifests import FILES, KEY, MANIFEST, ORIN, PLAN, lock_once, names, put, start

from jetrt.errors import BuildOptionError, EngineBuildError
from jetrt.provenance import (
    EngineFile,
    Manifest,
    Sha256Sidecar,
    build_once,
    engine_lock,
    existing,
)

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
