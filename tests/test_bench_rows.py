"""`jetrt bench` from end to end on the stand-ins and on onnxruntime: rows, statuses, files, messages, exit codes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rig

import fakes
import jetrt
from jetrt.bench import telemetry
from jetrt.bench.options import RUNTIMES, shape_of
from jetrt.bench.results import BenchReport
from jetrt.bench.subjects import subject
from jetrt.cli import main
from jetrt.errors import BenchOptionError, OutOfMemoryError

SCHEMA = json.loads((Path(jetrt.__file__).parent / "schemas" / "bench.schema.json").read_text())
QUICK = ["--iterations", "30", "--duration", "0", "--warmup-limit", "0.3", "--progress", "none"]


@pytest.fixture(autouse=True)
def nothing_wrong_on_the_device() -> Iterator[None]:
    """No stream is used that was destroyed already, say."""
    rig.cuda().reset()
    yield
    assert rig.mistakes() == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("onnxruntime")
    fakes.onnx_model(tmp_path / "m.onnx")
    fakes.write_plan(tmp_path / "d.engine", "mlp")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(*words: str, code: int = 0, picture: bool = False) -> dict[str, Any]:
    """Runs the command and reads the JSON, which follows its schema; the CSV has the same rows."""
    jsonschema = pytest.importorskip("jsonschema")
    shutil.rmtree("out", ignore_errors=True)
    assert main(["bench", *words, *QUICK, "--out", "out", *([] if picture else ["--no-picture"])]) == code
    (path,) = Path("out").glob("*.json")
    data: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(data, SCHEMA)
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == [row["status"] for row in data["rows"]]
    assert path.with_suffix(".md").read_text().startswith("# Latency\n")
    return data


def statuses(data: dict[str, Any]) -> dict[str, str]:
    return {" ".join(filter(None, (r["model"], r["precision"], r["runtime"]))): r["status"] for r in data["rows"]}


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert main(["bench", *words, *QUICK, "--out", "out"]) == code
    return capsys.readouterr().err


# ONNX and plans -------------------------------------------------------------------------------------------------------


def test_an_onnx_file_has_a_row_for_each_runtime_and_precision(folder: Path) -> None:
    data = bench("m.onnx")
    found = statuses(data)
    assert set(found) == {
        *(f"m {p} tensorrt" for p in ("fp32", "fp16", "bf16", "int8")),
        *(f"m {p} onnx_trt_ep" for p in ("fp32", "fp16", "bf16", "int8")),
        "m fp32 onnx_cpu",
        "m fp32 openvino_cpu",
    }
    for name in ("m fp32 tensorrt", "m fp16 tensorrt", "m fp32 onnx_cpu"):
        assert found[name] == "ok"
    rows = {f"{row['precision']} {row['runtime']}": row for row in data["rows"]}
    row = rows["fp16 tensorrt"]
    assert set(row["parts"]) == {"enqueue", "h2d", "gpu", "d2h"}
    assert row["end_to_end"]["calls"] == 30
    assert row["end_to_end"]["median"] > row["parts"]["gpu"]["median"]
    assert row["fps"] > 0
    assert (row["compile_seconds"] is not None, row["compiled_now"]) == (True, True)
    assert row["accuracy"]["state"] == "passed"
    assert row["accuracy"]["cosine"] > 0.999
    assert row["accuracy"]["reference"].startswith("onnxruntime (onnxruntime ")
    assert row["memory"]["device_used"] > 0
    assert row["settings"]["module_loading"] in ("eager", "lazy", None)
    assert "NVIDIA_TF32_OVERRIDE" in row["settings"]
    cpu = rows["fp32 onnx_cpu"]
    assert cpu["parts"] == {}  # it cannot tell them apart
    assert cpu["compile_seconds"] is None
    assert cpu["trtexec"] == {}


def test_int8_without_calibration_data_is_skipped_and_never_random(folder: Path) -> None:
    (row,) = bench("m.onnx", "--runtime", "tensorrt", "--precision", "int8")["rows"]
    assert row["status"] == "skipped"
    assert row["end_to_end"] is None
    assert row["reason"].startswith("--precision int8: int8 needs ranges: give --calib-data")
    assert "Ranges are never made up." in row["reason"]
    assert not list(folder.glob("*.engine.json"))


def test_int8_with_calibration_data(folder: Path) -> None:
    np.savez("calib.npz", x=np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32))
    words = ["--runtime", "tensorrt", "--precision", "fp32", "int8", "--calib-data", "calib.npz"]
    for row in bench("m.onnx", *words, "--build", "int8_only=true")["rows"]:
        assert row["status"] == "ok", row["reason"]


def test_a_plan_that_is_there_already_is_used(folder: Path) -> None:
    first = bench("m.onnx", "--runtime", "tensorrt", "--precision", "fp16")["rows"][0]
    (plan,) = folder.glob("m-1x64__*_fp16.engine")
    before = plan.stat().st_mtime_ns
    second = bench("m.onnx", "--runtime", "tensorrt", "--precision", "fp16")["rows"][0]
    assert plan.stat().st_mtime_ns == before
    assert (first["compiled_now"], second["compiled_now"]) == (True, False)
    assert second["compile_seconds"] == pytest.approx(first["compile_seconds"], abs=0.01)
    assert "the plan was there already; its compile time is that of its own build" in second["notes"]


def test_a_plan_of_other_options_or_another_model_is_not_taken_for_this_one(folder: Path) -> None:
    words = ["m.onnx", "--runtime", "tensorrt", "--precision", "fp16"]
    first = bench(*words)["rows"][0]
    second = bench(*words, "--opt-level", "2")["rows"][0]
    assert (second["status"], second["compiled_now"]) == ("ok", True)
    assert first["runs"] != second["runs"]
    model = (folder / "m.onnx").read_bytes()
    (folder / "m.onnx").write_bytes(model + b"\x12\x00")  # its producer, empty
    (row,) = bench(*words)["rows"]
    assert row["status"] == "failed"
    assert "is there already and was built from something else" in row["reason"]
    assert bench(*words, "--build", "overwrite=true")["rows"][0]["status"] == "ok"


def test_rows_that_differ_in_threads_share_a_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jetrt.bench import engine_session

    builds = []
    build_plan = engine_session.build_plan
    monkeypatch.setattr(engine_session, "build_plan", lambda *a, **k: builds.append(a) or build_plan(*a, **k))
    words = ["--runtime", "tensorrt", "--precision", "fp16", "--batch", "1", "2", "--concurrency", "1", "2"]
    data = bench("m.onnx", *words)
    assert [row["status"] for row in data["rows"]] == ["ok"] * 4
    assert [row["compiled_now"] for row in data["rows"]] == [True, False, True, False]
    assert len(builds) == 2


def test_batches_and_threads_are_swept(folder: Path) -> None:
    data = bench("d.engine", "--batch", "1", "4", "--concurrency", "1", "2", "--data", "device")
    assert [(r["batch"], r["concurrency"], r["end_to_end"]["calls"]) for r in data["rows"]] == [
        (1, 1, 30),
        (1, 2, 60),
        (4, 1, 30),
        (4, 2, 60),
    ]
    assert all(set(row["parts"]) == {"enqueue", "gpu"} for row in data["rows"])
    assert "--shapes=x:4x64" in data["rows"][2]["trtexec"]["10.x"]
    assert "--noDataTransfers" in data["rows"][2]["trtexec"]["10.x"]
    assert "--infStreams=2" in data["rows"][1]["trtexec"]["11.x"]


def test_an_engine_gives_back_all_that_a_row_took(folder: Path) -> None:
    bench("d.engine")
    cuda = fakes.FakeCuda()
    before = cuda.all_live()
    bench("d.engine", "--concurrency", "2")
    after = cuda.all_live()
    for kind in ("device", "stream", "event", "graph_exec"):
        assert after[kind] == before[kind], kind


def test_a_plan_is_compared_with_the_model_that_is_given(folder: Path) -> None:
    (row,) = bench("d.engine")["rows"]
    assert row["accuracy"]["state"] == "not compared"
    assert row["accuracy"]["reason"].startswith("there is no reference: a plan does not have its model.")
    fakes.write_plan(folder / "wrong.engine", "mlp", differ=0.3)
    np.savez("y.npz", y=fakes.mlp_reference(np.ones((8, 64), np.float32)))
    np.savez("x.npz", x=np.ones((8, 64), np.float32))
    data = bench("d.engine", "wrong.engine", "--inputs", "x.npz", "--batch", "8", "--reference", "y.npz")
    found = {row["model"]: row["accuracy"] for row in data["rows"] if row["model"] != "total"}
    assert (found["d"]["state"], found["wrong"]["state"]) == ("passed", "failed")
    assert found["wrong"]["max_abs"] > 0.01


def test_a_plan_that_was_built_for_another_precision_is_skipped(folder: Path) -> None:
    bench("m.onnx", "--runtime", "tensorrt", "--precision", "fp16")
    (plan,) = folder.glob("m-1x64__*_fp16.engine")
    data = bench(f"plan={plan}", "--precision", "fp16", "fp32")
    assert statuses(data) == {"plan fp16 tensorrt": "ok", "plan fp32 tensorrt": "skipped"}
    assert data["rows"][1]["reason"].startswith("the plan was built for fp16, not fp32")


def test_a_failing_engine_is_one_failed_row(folder: Path) -> None:
    fakes.write_plan(folder / "bad.engine", "mlp", fail="enqueue")
    data = bench("bad.engine", "d.engine")
    assert statuses(data) == {
        "bad own tensorrt": "failed",
        "d own tensorrt": "ok",
        "total own tensorrt": "incomplete",
        "total fastest fastest": "incomplete",
    }
    assert any(note.startswith("the first call failed: InferenceError") for note in data["rows"][0]["notes"])


def test_results_that_hold_nan_are_marked(folder: Path) -> None:
    fakes.write_plan(folder / "nan.engine", "mlp", differ="nan")
    (row,) = bench("nan.engine")["rows"]
    assert row["status"] == "nan"
    assert re.fullmatch(r"output 'y': \d+ of 10 elements are NaN", row["reason"])
    assert row["end_to_end"]["calls"] == 30


def test_without_batch_it_is_that_of_the_shape_or_the_inputs(folder: Path) -> None:
    np.savez("x.npz", x=np.ones((5, 64), np.float32))
    words = ["m.onnx", "d.engine", "--runtime", "onnx_cpu", "tensorrt", "--precision", "fp32", "--no-total"]
    for more, size in (
        (["--shape", "x=8x64"], 8),
        (["--inputs", "x.npz"], 5),
        (["--shape", "x=8x64", "--batch", "2"], 2),
    ):
        rows = bench(*words, *more)["rows"]
        assert [(row["status"], row["batch"], row["frames"]) for row in rows] == [("ok", size, size)] * 3


def test_without_batch_each_input_has_the_first_dimension_that_was_given(folder: Path) -> None:
    from jetrt.bench.inputs import batch_of, sized
    from jetrt.bench.options import BenchOptions
    from jetrt.builder.profiles import NetworkInput

    infos = [NetworkInput("image", "float32", (-1, 3)), NetworkInput("boxes", "float32", (-1, 4))]
    shapes = {"image": ((2, 3), None), "boxes": ((7, 4), None)}
    alone, swept = BenchOptions(shapes=shapes), BenchOptions(shapes=shapes, batches=(5,))
    assert sized(infos, batch_of(infos, None, alone), alone) == {"image": (2, 3), "boxes": (7, 4)}
    assert sized(infos, batch_of(infos, 5, swept), swept) == {"image": (5, 3), "boxes": (5, 4)}


def test_a_static_batch_is_what_it_is(folder: Path) -> None:
    profile = [([4, 8], [4, 8], [4, 8])]
    fakes.write_plan(folder / "s.engine", fakes.copy_of("float32", [4, 8], profile))
    assert bench("s.engine")["rows"][0]["batch"] == 4
    data = bench("s.engine", "--batch", "1", "4")
    assert [(r["status"], r["batch"]) for r in data["rows"]] == [("skipped", 1), ("ok", 4)]
    assert data["rows"][0]["reason"].startswith("--batch 1: the first dimension of no input is dynamic (x [4, 8])")


def test_bfloat16_inputs_go_to_the_device_as_they_are(folder: Path) -> None:
    fakes.write_plan(folder / "dit.engine", "dit5")
    (row,) = bench("dit.engine")["rows"]
    assert row["status"] == "ok", row["reason"]


def test_runtimes_that_do_not_run_a_subject(folder: Path) -> None:
    (row,) = bench("d.engine", "--runtime", "onnx_cpu")["rows"]
    assert (row["status"], row["reason"]) == ("skipped", "d is a plan, which is run by tensorrt")
    (row,) = bench("m.onnx", "--runtime", "onnx_cpu", "--precision", "fp16")["rows"]
    assert (row["status"], row["reason"]) == ("skipped", "onnx_cpu has no precision fp16; it has fp32")


def test_a_runtime_whose_package_is_missing_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (row,) = bench("m.onnx", "--runtime", "openvino_cpu")["rows"]
    assert row["status"] == "skipped"
    assert "The runtime 'openvino_cpu' cannot be had here. Missing: the package openvino" in row["reason"]
    (path,) = Path("out").glob("*.csv")
    with path.open(newline="") as file:
        assert [line["runtime"] for line in csv.DictReader(file)] == ["ovcpu"]


def test_without_tensorrt_its_rows_are_skipped(folder: Path) -> None:
    code = "import sys; from jetrt.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["bench", "m.onnx", "--runtime", "tensorrt,onnx_cpu", "--precision", "fp32", *QUICK, "--out", "out"]
    missing = {"JETRT_TENSORRT_PATH": str(folder), "LD_LIBRARY_PATH": None}
    done = fakes.run_python(code, *words, env=missing, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = Path("out").glob("*.json")
    found = {row["runtime"]: row for row in json.loads(path.read_text())["rows"]}
    assert (found["tensorrt"]["status"], found["onnx_cpu"]["status"]) == ("skipped", "ok")


def test_a_thousand_rows(folder: Path) -> None:
    (folder / "c.py").write_text("def f(x):\n    return x\n")
    batches = [str(n) for n in range(1, 501)]
    quick = ["--iterations", "1", "--duration", "0", "--warmup", "1", "--warmup-limit", "0", "--progress", "none"]
    words = [
        "bench",
        "c.py:f",
        "--shape",
        "x=1x2",
        "--batch",
        *batches,
        "--concurrency",
        "1",
        "2",
        *quick,
        "--out",
        "out",
    ]
    # In a process of its own: garbage is collected before each row, and that of all tests before this one is much.
    done = subprocess.run([sys.executable, "-m", "jetrt", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = Path("out").glob("*.json")
    data = json.loads(path.read_text())
    assert len(data["rows"]) == 1000
    assert {row["status"] for row in data["rows"]} == {"ok"}
    assert path.with_suffix(".png").stat().st_size > 0


# Callables ------------------------------------------------------------------------------------------------------------

CODE = """
import numpy as np

def plain(x, scale=1.0):
    return x * scale

def wrapper(**anything):
    return plain(**anything)

def bad(x):
    raise ValueError("no such frame")

def nan(x):
    return {"mask": x * np.nan, "score": 1.0}

class Runner:
    "counts what it is told"
    calls = []
    def reset(self):
        Runner.calls.append("reset")
    def __call__(self, frame, imgsz):
        Runner.calls.append(frame.shape)
        return frame.sum()

lengths = []
def clip(frames):
    lengths.append(len(frames))
    return frames.mean()

class Fixed:
    example_inputs = {"x": np.ones((1, 4))}
    def __call__(self, x):
        return x

later = iter(range(10**6))
def picky(x):
    if next(later) == 0:
        raise RuntimeError("not ready")
    return x
"""


@pytest.fixture
def code(folder: Path) -> Path:
    (folder / "c.py").write_text(CODE)
    return folder


def test_arguments_that_a_signature_does_not_take_are_left_out_and_named(code: Path) -> None:
    words = ["--shape", "x=4x4", "--arg", "max_frames_in_mem=600", "--arg", "scale=2"]
    data = bench("c.py:plain", "w=c.py:wrapper", *words)
    plain, wrapped = data["rows"][:2]
    assert (plain["status"], wrapped["status"]) == ("ok", "ok")
    assert plain["notes"] == ["left out, since its signature does not take them: max_frames_in_mem"]
    assert wrapped["notes"] == [
        "left out, since the first call refused it: max_frames_in_mem "
        "(plain() got an unexpected keyword argument 'max_frames_in_mem')"
    ]


def test_a_callable_that_raises_in_warm_up_and_later(code: Path) -> None:
    (row,) = bench("c.py:bad", "--shape", "x=4x4")["rows"]
    assert row["notes"] == ["the first call failed: ValueError: no such frame"]
    assert (row["status"], row["reason"]) == ("failed", "call 1: ValueError: no such frame")
    assert row["warmup"]["reason"] == "it failed: ValueError: no such frame"


def test_a_failing_warm_up_alone_is_not_fatal(code: Path) -> None:
    (row,) = bench("c.py:picky", "--shape", "x=4x4")["rows"]
    assert row["status"] == "ok"
    assert row["notes"] == ["the first call failed: RuntimeError: not ready"]
    assert row["warmup"]["calls"] >= 10  # the others are warmed up before they are measured


def test_a_callable_whose_results_hold_nan(code: Path) -> None:
    (row,) = bench("c.py:nan", "--shape", "x=4x4")["rows"]
    assert (row["status"], row["reason"]) == ("nan", "output 'mask': 16 of 16 elements are NaN")


def test_a_runner_with_state_is_called_frame_by_frame(code: Path) -> None:
    words = ["--clip", "frame", "--per-frame", "--shape", "frame=8x4x4x3", "--arg", "imgsz=4"]
    (row,) = bench("c.py:Runner", *words)["rows"]
    assert (row["status"], row["frames"]) == ("ok", 1)
    calls = sys.modules["jetrt_bench_c"].Runner.calls
    assert calls[:2] == ["reset", (4, 4, 3)]  # one frame first
    resets = [index for index, call in enumerate(calls) if call == "reset"]
    assert set(np.diff(resets[1:-1])) == {9}  # eight frames after each


def test_a_callable_of_a_whole_clip_counts_frames(code: Path) -> None:
    (row,) = bench("c.py:clip", "--clip", "frames", "--shape", "frames=8x4x4x3")["rows"]
    lengths = sys.modules["jetrt_bench_c"].lengths
    assert lengths[0] == 1  # one frame first
    assert set(lengths[1:]) == {8}
    assert row["frames"] == 8
    assert row["fps"] == pytest.approx(8e3 / row["end_to_end"]["mean"], rel=0.5)


def test_a_batch_that_the_inputs_of_a_callable_do_not_have_is_no_row(code: Path) -> None:
    """Otherwise its frames per second would be those of frames that nobody gave it."""
    np.savez("x.npz", x=np.ones((2, 4)))
    for words in (["c.py:Fixed"], ["c.py:plain", "--inputs", "x.npz"]):
        (row,) = bench(*words, "--batch", "8")["rows"]
        assert row["status"] == "skipped"
        assert re.match(r"--batch 8: no input of \w+ has that first dimension \(x \[[12], 4\]\)\. ", row["reason"])
    (row,) = bench("c.py:plain", "--inputs", "x.npz", "--batch", "2")["rows"]
    assert (row["status"], row["frames"]) == ("ok", 2)
    (row,) = bench("c.py:clip", "--clip", "frames", "--shape", "frames=8x4x4x3", "--batch", "2")["rows"]
    assert (row["status"], row["reason"]) == (
        "skipped",
        "--batch 2: with --clip a call takes one clip, or one frame of it",
    )


def test_several_threads_do_not_mix_up_the_state_of_a_runner(code: Path) -> None:
    words = [
        "--clip",
        "frame",
        "--per-frame",
        "--shape",
        "frame=8x4x4x3",
        "--arg",
        "imgsz=4",
        "--concurrency",
        "1",
        "2",
    ]
    one, two = bench("c.py:Runner", *words)["rows"]
    assert (one["status"], two["status"]) == ("ok", "skipped")
    assert two["reason"] == "--per-frame calls a runner that may have state, which several threads would mix up"


def test_what_a_callable_left_running_on_the_gpu_is_waited_for(code: Path) -> None:
    """By whatever library: here no torch is involved."""
    cuda = fakes.FakeCuda()
    before = cuda.count("cuCtxSynchronize")
    (row,) = bench("c.py:plain", "--shape", "x=4x4")["rows"]
    assert cuda.count("cuCtxSynchronize") - before >= row["end_to_end"]["calls"]


def test_the_reference_is_not_in_the_memory_of_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jetrt.bench.accuracy import References

    size = 256 << 20
    computed = References.of

    def large(self: References, inputs: Any) -> Any:
        np.ones(size, np.uint8)
        return computed(self, inputs)

    monkeypatch.setattr(References, "of", large)
    (row,) = bench("m.onnx", "--runtime", "onnx_cpu")["rows"]
    if row["memory"]["host_added"] is None:
        pytest.skip("the kernel does not let the peak be set back")
    assert row["memory"]["host_added"] < size


def test_an_engine_that_gets_no_memory_for_its_inputs_leaves_none_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jetrt.bench import engine_session

    (row,) = bench("d.engine")["rows"]
    assert row["status"] == "ok"
    cuda = fakes.FakeCuda()
    before = cuda.all_live()

    def no_memory(*_: Any) -> Any:
        raise OutOfMemoryError("no memory")

    monkeypatch.setattr(engine_session._cuda.DeviceArray, "upload", no_memory)
    (row,) = bench("d.engine")["rows"]
    assert (row["status"], row["reason"]) == ("failed", "OutOfMemoryError: no memory")
    after = cuda.all_live()
    for kind in ("device", "stream", "event", "graph_exec"):
        assert after[kind] == before[kind], kind


def test_trtexec_is_given_the_values_of_a_shape_tensor(folder: Path) -> None:
    fakes.write_plan(folder / "s.engine", "shape_input")
    np.savez("s.npz", x=np.ones(4, np.float32), size=np.array([2, 3], np.int64))
    (row,) = bench("s.engine", "--inputs", "s.npz")["rows"]
    assert row["status"] == "ok"
    assert "--shapes=x:4,size:2x3 " in row["trtexec"]["10.x"]


def test_the_reason_of_a_graph_that_failed_is_told() -> None:
    from jetrt.bench.engine_session import EngineSession
    from jetrt.bench.options import BenchOptions

    session = EngineSession()
    session._options = BenchOptions()
    failures = {"x [1, 64]": "the engine waits for the host", "x [2, 64]": "the engine waits for the host"}
    stats = {"replays": 0, "eager": 7, "graph_failures": failures, "strided_copies": 0, "casts": 0}
    session._engine = SimpleNamespace(stats=stats)
    session.finish()
    assert session.graph == "eager"
    assert session.notes == ["7 of 7 calls ran without a CUDA graph: the engine waits for the host"]


def test_onnx_trt_ep_is_no_row_of_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jetrt.bench import run

    monkeypatch.setattr(run, "_available", lambda *_, **__: None)
    (row,) = bench("m.onnx", "--runtime", "onnx_trt_ep", "--precision", "fp32", "--device", "cpu")["rows"]
    assert (row["status"], row["reason"]) == ("skipped", "onnx_trt_ep runs on GPUs, and --device is cpu")


def test_a_picture_of_an_earlier_bench_does_not_stay_beside_other_figures(folder: Path) -> None:
    Path("results").mkdir()
    stale, other = Path("results/latency_comparative_64.png"), Path("results/mine.png")
    for path in (stale, other):
        path.write_bytes(b"old")
    words = ["m.onnx", "--runtime", "onnx_cpu", "--out", "results", "--no-picture", *QUICK]
    assert main(["bench", *words]) == 0
    assert Path("results/latency_comparative_64.csv").is_file()
    assert (stale.exists(), other.exists()) == (False, True)


def test_ctrl_c_while_outputs_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jetrt.bench.accuracy import References

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(References, "of", interrupted)
    (row,) = bench("m.onnx", "--runtime", "onnx_cpu", code=130)["rows"]
    assert row["end_to_end"]["calls"] == 30
    assert (row["status"], row["reason"]) == (
        "interrupted",
        "Ctrl-C came after its calls, while its outputs were compared",
    )


def test_a_clip_that_is_not_there(code: Path) -> None:
    (row,) = bench("c.py:clip", "--clip", "video", "--shape", "frames=8x4x4x3")["rows"]
    assert row["status"] == "failed"
    assert row["reason"].startswith("BenchOptionError: --clip video: clip is given frames. Give the frames with")


def test_subjects_that_are_no_pipeline(code: Path) -> None:
    data = bench("c.py:plain", "d=c.py:plain", "--shape", "x=4x4", "--no-total")
    assert [row["model"] for row in data["rows"]] == ["plain", "d"]


def test_code_that_cannot_be_imported_is_one_failed_row(code: Path) -> None:
    (code / "broken.py").write_text("import no_such_package\n")
    data = bench("b=broken.py:f", "c.py:plain", "--shape", "x=4x4")
    assert data["rows"][0]["model"] == "b"
    assert data["rows"][0]["status"] == "failed"
    assert data["rows"][0]["reason"] == (
        "it could not be loaded: ModuleNotFoundError: No module named 'no_such_package'"
    )
    assert data["rows"][1]["status"] == "ok"


def test_a_component_may_come_in_two_forms(code: Path) -> None:
    data = bench("c=m.onnx", "c=c.py:plain", "d=m.onnx", "--runtime", "onnx_cpu", "python", "--shape", "x=1x64")
    assert len(data["rows"]) == 5
    assert statuses(data) == {
        "c fp32 onnx_cpu": "ok",
        "c own python": "ok",
        "d fp32 onnx_cpu": "ok",
        "total fp32 onnx_cpu": "ok",
        "total fastest fastest": "ok",
    }


def test_a_callable_is_compared_with_a_file(code: Path) -> None:
    x = np.arange(4, dtype=np.float32)
    np.savez("x.npz", x=x)
    np.savez("y.npz", output=x)
    (row,) = bench("c.py:plain", "--inputs", "x.npz", "--reference", "y.npz")["rows"]
    assert row["accuracy"]["state"] == "passed"
    (row,) = bench("c.py:plain", "--inputs", "x.npz", "--reference", "y.npz", "--arg", "scale=2")["rows"]
    assert row["accuracy"]["state"] == "failed"
    assert row["accuracy"]["max_abs"] == 3


def test_autocast_of_a_callable_without_torch(code: Path) -> None:
    if "torch" in sys.modules:
        pytest.skip("torch is imported in this process")
    (row,) = bench("c.py:plain", "--shape", "x=4x4", "--autocast_dtype", "float16")["rows"]
    assert row["status"] == "skipped"
    assert row["reason"].startswith("--autocast-dtype float16: the callable has not imported torch")


# The Python interface -------------------------------------------------------------------------------------------------


def test_the_function(folder: Path) -> None:
    def double(x: Any) -> Any:
        return 2 * x

    timing = {"calls": 25, "seconds": 0, "max_seconds": 0.3}
    found = jetrt_function()({"two": double}, shapes={"x": ((3, 3), None)}, timing=timing)
    assert isinstance(found, BenchReport)
    (row,) = found.rows
    assert (row.model, row.status, row.imgsz) == ("two", "ok", "3")
    assert found.files == {}
    assert "two" in found.table()
    with pytest.raises(BenchOptionError, match=r"unexpected keyword argument 'speed'"):
        jetrt_function()([double], speed=1)
    with pytest.raises(BenchOptionError, match="there is nothing to measure"):
        jetrt_function()([])
    with pytest.raises(BenchOptionError, match="two subjects of one kind are called 'double'"):
        jetrt_function()([double, double])


def jetrt_function() -> Callable[..., BenchReport]:
    import jetrt.bench as module

    return module  # type: ignore[return-value]  # the package itself can be called


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.onnx", "--runtime", "cpu"], f"--runtime is 'cpu'; allowed: {', '.join(RUNTIMES)}. Nothing else"),
        (["m.onnx", "--precision", "fp3"], "--precision is 'fp3'; allowed: fp32, fp16, bf16, int8, fp8, mixed."),
        (["no.onnx"], "no.onnx: there is no such file."),
        (["nothing"], "'nothing' is no subject; allowed: model.onnx, model.engine, "),
        (["no.py:f"], "no.py: there is no such file."),
        (["no_such_module:f"], "there is no module 'no_such_module' on sys.path"),
        (["json:no_such"], "json:no_such: json has no 'no_such'; what can be called in it: "),
        (["json:__version__"], "json:__version__ is a str, which cannot be called; allowed: a torch.nn.Module"),
        (["m.onnx", "--inputs", "no.npz"], "--inputs no.npz: there is no such file."),
        (["m.onnx", "--reference", "no.npz"], "--reference no.npz: there is no such file."),
        (["m.onnx", "--per-frame"], "--per-frame needs --clip NAME"),
        (["m.onnx", "--build", "no_such=1"], "build is 'no_such'; allowed: the options of jetrt.build except"),
        (["m.onnx", "m.onnx"], "two subjects of one kind are called 'm': give them names"),
        (["m.onnx", "--shape", "x=0x64"], "--shape x is '0x64'; allowed: sizes from 1"),
    ],
)
def test_a_senseless_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert refused(capsys, *words).startswith(f"jetrt: BenchOptionError: {message}")


@pytest.mark.parametrize("words", [["--batch", "0"], ["--idle-ms", "-1"], ["--duration", "nan"], ["--shape", "x"]])
def test_argparse_refuses(folder: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "m.onnx", *words])
    assert ended.value.code == 2


def test_a_shape_that_does_not_fit_is_a_failed_row(folder: Path) -> None:
    (row,) = bench("m.onnx", "--runtime", "onnx_cpu", "--shape", "x=1x63")["rows"]
    assert row["reason"] == "BenchOptionError: --shape x=1x63: the input is [-1, 64] (-1: any)."
    (row,) = bench("m.onnx", "--runtime", "onnx_cpu", "--shape", "z=1x64")["rows"]
    assert row["reason"] == "BenchOptionError: --shape z: the inputs of m are x."


def test_a_dynamic_dimension_that_nothing_fills(folder: Path) -> None:
    fakes.write_plan(folder / "n.engine", fakes.copy_of("float32", [-1, -1], [([1, 1], [2, 4], [8, 8])]))
    assert bench("n.engine")["rows"][0]["imgsz"] == "4"  # the profile's optimum
    helper = pytest.importorskip("onnx_models")
    helper.save(folder / "w.onnx", [("Relu", ["x"], ["y"], {})], [("x", 1, ["N", "W"])], [("y", 1, ["N", "W"])])
    (row,) = bench("w.onnx", "--runtime", "onnx_cpu")["rows"]
    assert row["reason"] == (
        "BenchOptionError: input 'x' of w is [-1, -1]: nothing says how large W is. Add --shape x=1xN."
    )


@pytest.mark.parametrize("place", ["file/sub", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_found_before_the_first_run(
    folder: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (folder / "file").write_text("")
    (folder / "c.py").write_text("def f():\n    open('ran', 'w').close()\n")
    assert main(["bench", "c.py:f", "--out", place]) == 2
    assert capsys.readouterr().err.startswith(f"jetrt: BenchOptionError: --out {place}: nothing can be written there (")
    assert not (folder / "ran").exists()


def test_sensors_that_give_garbage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = SimpleNamespace(gpu_clock_mhz=-210, gpu_temp_c=55.0, throttle_active=None, reasons=())
    monkeypatch.setitem(sys.modules, "jetrt.thermal", SimpleNamespace(monitor=lambda device: garbage_monitor(garbage)))
    (row,) = bench("m.onnx", "--runtime", "onnx_cpu")["rows"]
    assert row["after"]["gpu_clock_mhz"] is None
    assert row["after"]["gpu_temp_c"] == 55.0
    assert "sensors after the row gave what cannot be: gpu_clock_mhz is -210" in row["notes"]


def garbage_monitor(snapshot: Any) -> Any:
    return SimpleNamespace(snapshot=lambda: snapshot)


def test_without_sensors_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jetrt.thermal", None)
    assert telemetry.Telemetry().read() is None
    data = bench("m.onnx", "--runtime", "onnx_cpu")
    assert data["notes"][0].startswith("no temperatures, clocks and power: ")
    assert data["rows"][0]["status"] == "ok"


def test_without_matplotlib_there_is_no_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = bench("m.onnx", "--runtime", "onnx_cpu", picture=True)
    assert data["notes"][-1] == "no picture: it needs the package matplotlib: pip install 'jetrt[plot]'."
    assert "note: no picture" in capsys.readouterr().out
    assert not list(Path("out").glob("*.png"))


@pytest.mark.parametrize("when", ["measuring", "opening"])
def test_ctrl_c_in_the_middle_keeps_what_was_measured(folder: Path, when: str) -> None:
    """A real SIGINT to the command, in the second of three rows."""
    seconds = 0.01 if when == "measuring" else 600
    (folder / "slow.py").write_text(
        "import time\n"
        "class Slow:\n"
        "    def __call__(self, x):\n"
        "        open('running', 'w').close()\n"
        f"        time.sleep({seconds})\n"
    )
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from jetrt.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["bench", "a=m.onnx", "b=slow.py:Slow", "c=m.onnx", "--runtime", "onnx_cpu", "python", "--shape", "x=1x64"]
    words += [
        "--iterations",
        "2000",
        "--duration",
        "0.1",
        "--warmup-limit",
        "0.1",
        "--progress",
        "none",
        "--out",
        "out",
    ]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words], env=fakes.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        end = time.monotonic() + 60
        while not (folder / "running").exists():
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(1)
        os.kill(child.pid, signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, errors
    (path,) = Path("out").glob("*.json")
    data = json.loads(path.read_text())
    assert (data["interrupted"], data["complete"]) == (True, False)
    found = {row["model"]: row for row in data["rows"]}
    assert [found[name]["status"] for name in "abc"] == ["ok", "interrupted", "not run"]
    assert found["a"]["end_to_end"]["calls"] >= 2000
    if when == "measuring":
        assert re.fullmatch(r"Ctrl-C came after \d+ calls", found["b"]["reason"])
        assert found["b"]["end_to_end"]["calls"] > 0
    else:
        assert found["b"]["reason"] == "Ctrl-C came while it was prepared"
    assert found["c"]["reason"] == "Ctrl-C came before it"
    assert "**Interrupted" in path.with_suffix(".md").read_text()


def test_the_function_raises_ctrl_c_with_the_report(folder: Path) -> None:
    def stopped(x: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        jetrt_function()([stopped], shapes={"x": ((1,), None)}, out=folder / "out")
    assert interrupt.value.report.rows[0].status == "interrupted"  # type: ignore[attr-defined]
    assert list((folder / "out").glob("*.json"))


# Subjects -------------------------------------------------------------------------------------------------------------


def test_names_before_subjects(folder: Path) -> None:
    assert subject("first=m.onnx").name == "first"
    assert subject("m.onnx").name == "m"
    assert (subject("json:loads").name, subject("json:loads").kind) == ("loads", "callable")
    (folder / "a=b.onnx").write_bytes((folder / "m.onnx").read_bytes())
    assert subject("a=b.onnx").name == "a=b"  # a file of that very name
    (folder / "plan.bin").write_bytes((folder / "d.engine").read_bytes())
    assert subject("plan.bin").kind == "plan"


def test_example_inputs_may_be_a_function_of_the_batch(code: Path) -> None:
    (code / "e.py").write_text(
        "import numpy as np\n"
        "def f(x):\n    return x\n"
        "def example_inputs(batch):\n    return {'x': np.zeros((batch, 2), np.float32)}\n"
    )
    data = bench("e.py:f", "--batch", "1", "3")
    assert [row["batch"] for row in data["rows"]] == [1, 3]
    assert {row["status"] for row in data["rows"]} == {"ok"}


@pytest.mark.parametrize("text", ["x", "x=", "=1x2", "x=1xx2", "x=1x2:", "x=-1x2"])
def test_a_shape_is_a_name_and_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it as NAME=1x3x224x224"):
        shape_of(text)
    assert shape_of("a=b=1x8:int64") == ("a=b", ((1, 8), "int64"))


def test_ctrl_c_while_a_plan_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jetrt.bench import engine_session
    from jetrt.errors import BuildCrashError

    def interrupted(*_: Any, **__: Any) -> Any:
        raise BuildCrashError("interrupted", how="interrupted")

    monkeypatch.setattr(engine_session, "build_plan", interrupted)
    data = bench("m.onnx", "--runtime", "tensorrt", "onnx_cpu", "--precision", "fp32", code=130)
    assert [(row["status"], row["reason"]) for row in data["rows"]] == [
        ("interrupted", "Ctrl-C came while its plan was built"),
        ("not run", "Ctrl-C came before it"),
    ]


def test_a_build_that_fails_is_one_failed_row(folder: Path) -> None:
    (folder / "broken.onnx").write_bytes(b"not a model")
    data = bench("broken.onnx", "m.onnx", "--runtime", "tensorrt", "--precision", "fp32", "--no-total")
    assert [row["status"] for row in data["rows"]] == ["failed", "ok"]
    assert data["rows"][0]["reason"].startswith("ModelError: broken.onnx")
    assert data["rows"][0]["memory"] == {}  # nothing was opened
