"""The child process of a build: how its deaths are told, that Ctrl-C and time limits end it, and the frames between."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fakes
import jetrt
from jetrt.builder import process
from jetrt.builder.frames import FrameError, Link
from jetrt.builder.process import run_job
from jetrt.errors import BuildCrashError, EngineBuildError, ModelError

SHAPES = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
QUICK = {**SHAPES, "parity": False, "audit": False, "progress": "none"}
#: Gives the interpreter and its imports their time on a machine where other tests run.
SECONDS = 10.0


def build(folder: Path, fault: dict[str, Any], **more: Any) -> jetrt.builder.pipeline.BuildResult:
    model = fakes.onnx_model(folder / "m.onnx", build=fault)
    return jetrt.build(model, folder / "m.engine", **{**QUICK, **more})


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Deaths ---------------------------------------------------------------------------------------------------------------

NEEDS_REFERENCE = pytest.mark.skipif(
    find_spec("onnxruntime") is None, reason="the package onnxruntime is not installed"
)
STEP = r"Try another --opt-level, or another TensorRT version\."
DEATHS = [
    ("crash", "crash", signal.SIGSEGV, rf"it crashed \(SIGSEGV\)\. {STEP}"),
    ("abort", "crash", signal.SIGABRT, rf"it crashed \(SIGABRT\)\. {STEP}"),
    ("exit", "crash", None, rf"it ended with status 3 before it had answered\. {STEP}"),
    (
        "kill",
        "killed",
        signal.SIGKILL,
        r"it was killed \(SIGKILL\), by somebody or for lack of memory; at the least \d+ MiB of the machine's memory "
        r"were available\. If nobody did: free memory, lower --workspace, or give --low-memory-mode\.",
    ),
]


@pytest.mark.parametrize("phase", ["parse", "build"])
@pytest.mark.parametrize(("outcome", "how", "number", "text"), DEATHS)
def test_deaths(tmp_path: Path, phase: str, outcome: str, how: str, number: int | None, text: str) -> None:
    said = [f"line {i}" for i in range(60)] + ["the very last line"]
    fault = {"outcome": outcome, "log": [[2, line] for line in said]}
    with pytest.raises(BuildCrashError) as caught:
        build(tmp_path, {"parse": fault} if phase == "parse" else fault)
    error = caught.value
    assert re.match(rf"the process for the build ended after \d+\.\d s in phase '{phase}': {text}", error.message)
    assert (error.how, error.signal, error.phase) == (how, number, phase)
    assert error.seconds is not None
    assert 0 < error.seconds < SECONDS
    # The line right before the end is there, once, and those before it in order.
    shown = error.message.split("Its last lines:\n")[1].splitlines()
    ours = [line.strip() for line in shown if line.strip() in said]
    assert ours[-1] == "the very last line"
    assert ours == said[-len(ours) :]
    assert error.log is not None
    assert error.log.count("the very last line") == 1
    assert left(tmp_path) == ["m.onnx"]


def test_what_a_library_prints_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    # Rust's own text of a panic, which goes past TensorRT's logger.
    with pytest.raises(BuildCrashError, match=r"crashed \(SIGABRT\)") as caught:
        build(tmp_path, {"memory": 1 << 60})
    assert caught.value.log is not None
    assert [line for line in caught.value.log if "1152921504606846976 bytes failed" in line], caught.value.log
    assert left(tmp_path) == ["m.onnx"]


def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter(range(100))
    monkeypatch.setattr(process, "_oom_kills", lambda: next(kills))
    with pytest.raises(BuildCrashError, match="the kernel killed it for lack of memory; at the least") as caught:
        build(tmp_path, {"outcome": "kill"})
    assert caught.value.how == "out of memory"
    assert "Free memory, lower --workspace and --tactic-memory, or give --low-memory-mode." in str(caught.value)


def test_killed_from_outside(tmp_path: Path) -> None:
    def kill() -> None:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for child in children(os.getpid()):
                with_plan = list(tmp_path.glob(".m.engine.lock"))
                if with_plan and b"jetrt.builder.child" in command_of(child):
                    time.sleep(0.5)
                    os.kill(child, signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(BuildCrashError, match=r"it was killed \(SIGKILL\)") as caught:
        build(tmp_path, {"outcome": "hang"})
    killer.join()
    assert caught.value.how == "killed"
    assert left(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("silent", [True, False])
def test_timeout(tmp_path: Path, silent: bool) -> None:
    # With progress callbacks TensorRT is asked to stop; without, the process is killed.
    begin = time.monotonic()
    with pytest.raises(BuildCrashError) as caught:
        build(tmp_path, {"seconds": 60, "silent": silent, "log": [[2, "timing tactics"]]}, timeout=2)
    assert time.monotonic() - begin < 2 + SECONDS
    assert re.search(
        r"in phase 'build': it did not end within \d+(\.\d+)? s\. Give it more time, or lower --opt-level\.\n"
        r"Its last lines:\n(.*\n)*  timing tactics",
        caught.value.message,
    )
    assert caught.value.how == "timeout"
    assert left(tmp_path) == ["m.onnx"]


def test_a_plan_that_dies_when_it_is_tried(tmp_path: Path) -> None:
    with pytest.raises(BuildCrashError, match=r"the process for trying the plan .*phase 'run': it crashed \(SIGSEGV\)"):
        build(tmp_path, {"run": "crash"}, parity=True)
    assert left(tmp_path) == ["m.onnx"]


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"m\.onnx|no plan|TensorRT") as caught:
        build(tmp_path, {"outcome": "null", "log": [[1, "could not find any implementation for node /product"]]})
    assert "could not find any implementation for node /product" in str(caught.value)
    assert left(tmp_path) == ["m.onnx"]


# Memory ---------------------------------------------------------------------------------------------------------------


def mapped() -> str:
    return Path("/proc/self/maps").read_text()


MAPS = """
import sys, fakes, jetrt
from pathlib import Path
folder = Path(sys.argv[1])
model = fakes.onnx_model(folder / "m.onnx")
result = jetrt.build(model, folder / "m.engine", min="x:1x64", opt="x:8x64", max="x:64x64", precision="fp16",
                     progress="none")
assert result.manifest.parity.state == "passed"
maps = Path("/proc/self/maps").read_text()
print([name for name in ("libnvinfer", "libcuda", "libnvonnxparser", "onnxruntime") if name in maps])
"""


@NEEDS_REFERENCE
def test_the_caller_loads_nothing(tmp_path: Path) -> None:
    """No TensorRT, no CUDA context and no onnxruntime in the process that asked: all memory returns."""
    assert fakes.run_python(MAPS, str(tmp_path)).stdout == "[]\n"


def test_the_peak_of_memory_is_told(tmp_path: Path) -> None:
    eaten = 300 << 20
    result = build(tmp_path, {"memory": eaten})
    report = result.manifest.build
    assert report is not None
    assert report.peak_host_bytes is not None
    assert eaten < report.peak_host_bytes < eaten + (400 << 20)


# Ctrl-C and the parent's death ----------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            continue
    return found


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Started:
    """`jetrt build` in a process group of its own, waiting in TensorRT."""

    def __init__(self, folder: Path, *more: str) -> None:
        fakes.onnx_model(folder / "m.onnx", build={"seconds": 600, "log": [[2, "it has begun"]]})
        shapes = [word for name, text in SHAPES.items() for word in (f"--{name}", text)]
        command = [sys.executable, "-m", "jetrt", "build", "--onnx", "m.onnx", "--engine", "m.engine", *shapes, *more]
        self.process = subprocess.Popen(
            [*command, "--progress", "plain"],
            cwd=folder,
            env=fakes.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        )
        self.child = self.building()

    def building(self) -> int:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "building m.engine: build" in line:
                (child,) = children(self.process.pid)
                assert b"jetrt.builder.child" in command_of(child)
                time.sleep(0.3)  # from the phase to the first callback
                return child
        raise AssertionError("it never came to the build")

    def end(self) -> str:
        text, _ = self.process.communicate(timeout=SECONDS)
        return text


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    one = Started(tmp_path)
    with one.process:
        yield one
        one.process.kill()


@pytest.mark.parametrize("group", [False, True], ids=["the process", "its group, as a terminal does"])
def test_ctrl_c(tmp_path: Path, started: Started, group: bool) -> None:
    begin = time.monotonic()
    os.kill(-started.process.pid if group else started.process.pid, signal.SIGINT)
    text = started.end()
    assert time.monotonic() - begin < 1.5
    assert started.process.returncode == 130
    assert re.search(
        r"jetrt: BuildCrashError: the process for the build ended after \d+\.\d s in phase 'build': it was stopped by "
        r"Ctrl-C\.\nIts last lines:\n(.*\n)*  it has begun",
        text,
    )
    assert "Traceback" not in text
    assert not running(started.child)
    assert left(tmp_path) == ["m.onnx"]


def test_ctrl_c_where_tensorrt_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRT_BUILD", json.dumps({"outcome": "hang", "seconds": 0}))
    one = Started(tmp_path)
    begin = time.monotonic()
    one.process.send_signal(signal.SIGINT)
    one.end()
    assert time.monotonic() - begin < 1.5
    assert one.process.returncode == 130
    assert not running(one.child)
    assert left(tmp_path) == ["m.onnx"]


def test_the_child_dies_with_its_parent(tmp_path: Path, started: Started) -> None:
    started.process.kill()
    started.process.wait()
    until = time.monotonic() + SECONDS
    while running(started.child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(started.child)
    # What the killed one left goes with the next build, which needs no lock to be removed.
    assert "m.engine" not in left(tmp_path)
    assert ".m.engine.lock" in left(tmp_path)
    build(tmp_path, {})
    assert left(tmp_path) == ["m.engine", "m.engine.json", "m.engine.sha256", "m.onnx"]


def test_a_child_without_a_request_says_so() -> None:
    ours, theirs = os.pipe()
    os.close(theirs)
    out, their_out = os.pipe()
    command = [sys.executable, "-m", "jetrt.builder.child", str(ours), str(their_out), str(os.getpid())]
    done = subprocess.run(command, pass_fds=(ours, their_out), capture_output=True, text=True, timeout=60, check=False)
    for fd in (ours, out, their_out):
        os.close(fd)
    assert (done.returncode, done.stderr) == (1, "no request came: the other process is gone\n")


# What a child sends ---------------------------------------------------------------------------------------------------


def faked(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Puts a script in the child's place; `out` is the pipe to the parent."""
    script = folder / "child.py"
    script.write_text(f"import os, struct, sys, time\nout = os.fdopen(int(sys.argv[2]), 'wb')\n{code}\n")
    popen = subprocess.Popen

    def start(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, str(script), *command[4:]], **more)

    monkeypatch.setattr(process.subprocess, "Popen", start)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            "out.write(struct.pack('<Q', 1 << 62)); out.flush(); time.sleep(60)",
            "a message of 4611686018427387904 bytes",
        ),
        ("out.write(struct.pack('<Q', 4) + b'hey!'); out.flush(); time.sleep(60)", r"bytearray|b'hey!' is no message"),
        ("out.write(struct.pack('<Q', 2) + b'[]'); out.flush()", r"b'\[\]' is no message \(TypeError"),
    ],
)
def test_broken_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, text: str) -> None:
    faked(monkeypatch, tmp_path, code)
    begin = time.monotonic()
    with pytest.raises(BuildCrashError, match=f"in phase 'start': its answer is broken: {text}") as caught:
        run_job("build", {})
    assert caught.value.how == "crash"
    assert time.monotonic() - begin < SECONDS


def test_a_child_that_closes_its_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_LINGER", 0.3)
    faked(monkeypatch, tmp_path, "print('bye', flush=True); out.close(); time.sleep(60)")
    with pytest.raises(BuildCrashError, match="it closed its pipe before it had answered") as caught:
        run_job("run", {})
    assert caught.value.log == ["bye"]


def test_a_child_that_dies_while_it_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = json.dumps({"event": "ask", "question": "batch", "names": ["x"], "arrays": []})
    code = f"text = {question!r}.encode(); out.write(struct.pack('<Q', len(text)) + text); out.flush(); os._exit(7)"
    faked(monkeypatch, tmp_path, code)

    def ask(message: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        time.sleep(0.5)
        return {"more": True}, {"x": np.zeros(10**6)}

    with pytest.raises(BuildCrashError, match="it ended with status 7 before it had answered"):
        run_job("build", {}, ask=ask)


def test_errors_come_over_whole(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(fakes.onnx_bytes({"nodes": [fakes.node("Nope", ["x"], ["y"])], **ENDS}))
    with pytest.raises(ModelError) as caught:
        jetrt.build(tmp_path / "m.onnx", tmp_path / "m.engine", progress="none")
    assert caught.value.path == str(tmp_path / "m.onnx")
    assert caught.value.problems is not None
    assert caught.value.problems[0]["operator"] == "Nope"


ENDS = {"inputs": [("x", "float32", [4])], "outputs": [("y", "float32", [4])]}


def test_an_unknown_job() -> None:
    with pytest.raises(EngineBuildError, match="the child process failed: KeyError: 'nothing'") as caught:
        run_job("nothing", {})
    assert caught.value.log is not None
    assert "Traceback" in caught.value.log[0]


# Frames ---------------------------------------------------------------------------------------------------------------


class Pipe:
    def __init__(self) -> None:
        read, write = os.pipe()
        self.read, self.write = os.fdopen(read, "rb", buffering=0), os.fdopen(write, "wb")
        self.link = Link(self.read, self.write)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.read, self.write):
            file.close()

    def raw(self, data: bytes, *, closed: bool = True) -> None:
        self.write.write(data)
        self.write.flush()
        if closed:
            self.write.close()


def passed(message: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    with Pipe() as pipe:
        sender = threading.Thread(target=pipe.link.send, args=(message, arrays))
        sender.start()
        try:
            return pipe.link.receive()
        finally:
            sender.join()


NAMES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
NAMES += ["float16", "float32", "float64", "complex64", ">f4", ">i8", "V2"]
EXTRA = ["bfloat16", "float8_e4m3fn", "int4"]


def dtypes() -> list[np.dtype[Any]]:
    found = [np.dtype(name) for name in NAMES]
    try:
        import ml_dtypes
    except ImportError:
        return found
    return found + [np.dtype(getattr(ml_dtypes, name)) for name in EXTRA]


@st.composite
def arrays_of_any_kind(draw: st.DrawFn) -> Any:
    dtype = draw(st.sampled_from(dtypes()))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    data = draw(st.binary(min_size=int(np.prod(shape)) * dtype.itemsize, max_size=int(np.prod(shape)) * dtype.itemsize))
    if dtype == np.dtype(bool):
        data = bytes(byte & 1 for byte in data)
    array = np.frombuffer(data, dtype).reshape(shape)
    return draw(st.sampled_from([array, array.T, array[..., ::-1] if array.ndim else array]))


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text(max_size=20), arrays_of_any_kind(), max_size=4),
    st.dictionaries(st.text(max_size=9).filter(lambda key: key != "arrays"), st.integers() | st.text(), max_size=4),
)
def test_round_trip(arrays: dict[str, Any], message: dict[str, Any]) -> None:
    got, found = passed(message, arrays)
    assert got == message
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        native = array.astype(array.dtype.newbyteorder("=")) if not array.dtype.isnative else array
        assert found[name].tobytes() == native.tobytes()
        assert found[name].dtype == native.dtype or native.dtype == np.dtype("V2")


def test_a_large_array_passes() -> None:
    array = np.arange(3 << 20, dtype=np.float32).reshape(3, -1)
    _, found = passed({}, {"x": array, "y": array[:, ::2]})
    assert np.array_equal(found["x"], array)
    assert np.array_equal(found["y"], array[:, ::2])


def frame(head: Any) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (struct.pack("<Q", (1 << 30) + 1), "a message of 1073741825 bytes; the largest allowed has 1073741824"),
        (frame(b"\xff\xfe"), "is no message"),
        (frame(b"[" * 50_000), r"is no message \(RecursionError"),
        (frame([]), r"is no message"),
        (frame("text"), r"is no message \(AttributeError"),
        (frame({}), r"is no message \(KeyError: 'arrays'\)"),
        (frame({"arrays": 3}), r"is no message \(TypeError"),
        (frame({"arrays": [["x", "float32"]]}), r"is no message \(ValueError"),
        (frame({"arrays": [["x", "object", [1]]]}), "arrays of object are not sent"),
        (frame({"arrays": [["x", "S0", [1]]]}), "arrays of S0 are not sent"),
        (frame({"arrays": [["x", "nonsense", [1]]]}), r"is no message \(AttributeError|arrays of nonsense need"),
        (frame({"arrays": [["x", "float32", [-1]]]}), r"\[-1\] is no shape"),
        (frame({"arrays": [["x", "float32", [1.5]]]}), r"\[1\.5\] is no shape"),
        (frame({"arrays": [["x", "float32", [1 << 61]]]}), "9223372036854775808 bytes are announced"),
        (frame({"arrays": [["x", "uint8", [1 << 62]]]}), "4611686018427387904 bytes are announced"),
    ],
)
def test_hostile_frames(data: bytes, text: str) -> None:
    with Pipe() as pipe:
        pipe.raw(data, closed=False)
        with pytest.raises(FrameError, match=text):
            pipe.link.receive()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_bytes_do_harm(noise: bytes, cut: int) -> None:
    good = frame({"event": "x", "arrays": [["x", "float32", [2, 3]]]}) + bytes(24)
    for data in (noise, good[:cut] + noise, frame(noise) + noise):
        with Pipe() as pipe:
            pipe.raw(data)
            try:
                message, _ = pipe.link.receive()
                assert isinstance(message, dict)
            except (EOFError, FrameError):
                pass


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_frame_that_ends_early(cut: int) -> None:
    data = frame({"arrays": [["x", "float32", [2, 3]]]}) + bytes(24)
    with Pipe() as pipe:
        pipe.raw(data[:cut])
        with pytest.raises(EOFError, match="the other process is gone"):
            pipe.link.receive()
