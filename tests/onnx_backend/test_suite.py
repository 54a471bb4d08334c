"""The suite's own machinery: on an executor that crashes, hangs and errs on purpose, and on the stand-in libraries."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the package onnx is not installed (it does not take numpy 1.21)")

import compare
import run
from cases import Case, collect, difference
from pool import PoolError, Result, run_all


def case(name: str) -> Case:
    return Case(name, "test", b"", 1e-3, 1e-7, (), (), ())


class Fake:
    """Does what the case's name says."""

    def __init__(self, folder: Path) -> None:
        self.done = 0

    def versions(self) -> dict[str, str]:
        return {"executor": "fake", "tensorrt": "10.6.0"}

    def run(self, case: Case, stage) -> Result:
        self.done += 1
        stage("builder")
        kind = case.name.split("_")[1]
        if kind == "abort":
            os.write(2, b"Assertion `mScopedOps.size()' failed\n")
            os.kill(os.getpid(), signal.SIGABRT)
        if kind == "leave":
            os._exit(3)
        if kind == "hang":
            time.sleep(1000)
        if kind == "kernel":
            return Result("run", "an illegal memory access", "InferenceError")
        return Result("pass", f"number {self.done} of process {os.getpid()}")


class NoLibrary(Fake):
    def __init__(self, folder: Path) -> None:
        raise OSError("libnvinfer.so.10: not found")


class NeverReady(Fake):
    def __init__(self, folder: Path) -> None:
        time.sleep(1000)


def results_of(names, make=Fake, **options):
    options = {"workers": 2, "timeout": 60, **options}
    return {done.name: result for done, result in run_all([case(name) for name in names], make, **options)}


def test_a_death_costs_one_case():
    names = ["0_pass", "1_abort", "2_pass", "3_leave", "4_pass", "5_pass", "6_kernel", "7_pass"]
    about = {}
    found = results_of(names, workers=1, about=about)
    assert sorted(found) == names
    assert about == {"executor": "fake", "tensorrt": "10.6.0"}
    assert [found[name].status for name in names] == ["pass", "crash", "pass", "crash", "pass", "pass", "run", "pass"]
    assert found["1_abort"].reason == "in stage builder: SIGABRT: Assertion `mScopedOps.size()' failed"
    assert found["3_leave"].reason == "in stage builder: exit status 3"
    # One process does many cases, and another one goes on after a death or a failed kernel.
    who = {name: found[name].reason.split()[-1] for name in names if name.endswith("pass")}
    assert who["4_pass"] == who["5_pass"]
    assert len(set(who.values())) == 4
    assert found["5_pass"].reason.startswith("number 2 of")


def test_a_hang_ends():
    found = results_of(["0_pass", "1_hang", "2_pass"], timeout=2)
    assert [found[name].status for name in sorted(found)] == ["pass", "timeout", "pass"]
    assert found["1_hang"].reason == "in stage builder: more than 2 s, SIGKILL"
    assert 2 <= found["1_hang"].seconds < 20


def test_no_case_is_begun_after_the_budget():
    assert results_of(["0_pass", "1_pass"], budget=0) == {}


def test_a_worker_that_cannot_start():
    with pytest.raises(PoolError, match=r"could not start \(crash: exit status 1: OSError: libnvinfer.so.10: not"):
        results_of(["0_pass"], NoLibrary)


def test_a_worker_that_is_never_ready(monkeypatch):
    monkeypatch.setattr("pool.START_SECONDS", 1)
    with pytest.raises(PoolError, match=r"could not start \(timeout: more than 1 s, SIGKILL"):
        results_of(["0_pass"], NeverReady)


BF16_ONE, BF16_NEXT, BF16_FAR = (np.array([bits], np.uint16) for bits in (0x3F80, 0x3F82, 0x3F84))


def bf16(bits):
    import ml_dtypes

    return bits.view(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("expected", "found", "complaint"),
    [
        ([np.float32([1, 2])], [np.float32([1.0009, 2])], None),
        ([np.float32([1, 2])], [np.float32([1.002, 2])], "output 0: 1 of 2 values differ, first at [0]: 1.00"),
        ([np.float32([np.nan, -np.inf])], [np.float32([np.nan, -np.inf])], None),
        ([np.float32([0])], [np.float32([np.nan])], "output 0: 1 of 1 values differ, first at [0]: nan; expected 0.0"),
        ([np.array([True])], [np.array([False])], "output 0: 1 of 1 values differ, first at [0]: False; expected True"),
        ([np.int64([7])], [np.int64([8])], "output 0: 1 of 1 values differ"),
        ([np.float32(3)], [np.float32([3])], "output 0: shape [1]; expected []"),
        ([np.float32([3])], [np.float16([3])], "output 0: float16; expected float32"),
        ([np.float32([3])], [], "0 outputs; expected 1"),
        ([["a"]], [np.float32([3])], "output 0: an array; expected list"),
        ([np.zeros((0, 2), np.float32)], [np.zeros((0, 2), np.float32)], None),
        ([bf16(BF16_ONE)], [bf16(BF16_NEXT)], None),
        ([bf16(BF16_ONE)], [bf16(BF16_FAR)], "output 0: 1 of 1 values differ, first at [0]: 1.03125; expected 1"),
    ],
)
def test_difference(expected, found, complaint):
    expected = [np.asarray(e) if isinstance(e, np.generic) else e for e in expected]
    got = difference(expected, found, 1e-3, 1e-7)
    assert got is complaint is None or (complaint and got and got.startswith(complaint)), got


def test_the_parity_gate_is_asked():
    from executors import Jetrt

    import jetrt

    executor = object.__new__(Jetrt)  # without the libraries
    executor.jetrt = jetrt
    expected = [np.float32([[1, 2], [3, 4]])]
    one = Case("one", "test", b"", 1e-3, 1e-7, ("x",), ("y",), ((tuple(expected), tuple(expected)),))

    def answer(*found):
        executor.execute = lambda case, stage: [list(found)]
        return executor.run(one, lambda stage: None)

    assert answer(*expected) == Result("pass")
    triu = answer(np.float32([[1, 2], [0, 4]]))
    assert triu.status == "wrong"
    assert triu.gate.startswith("ParityError: output 'y' at opt of profile 0 differs from the reference (npz): cosine")
    # Where the suite is stricter than the gate, that is written down, not hidden.
    assert answer(np.float32([[1, 2], [3, 4.0045]])).gate == "passed"

    def explode(case, stage):
        stage("builder")
        raise jetrt.errors.EngineBuildError("TensorRT built no plan\nmore")

    executor.execute = explode
    assert executor.run(one, lambda stage: None) == Result("builder", "TensorRT built no plan", "EngineBuildError")


def test_the_suite_is_all_there():
    """The numbers of onnx 1.23, and that each case has data for its inputs and outputs."""
    cases = collect()
    assert len(cases) > 1500
    assert {found.kind for found in cases} == {"node", "simple", "pytorch-operator", "pytorch-converted"}
    for found in cases:
        for inputs, outputs in found.data:
            assert (len(inputs), len(outputs)) == (len(found.inputs), len(found.outputs)), found.name
    (add,) = (found for found in cases if found.name == "test_add")
    (((x, y), (total,)),) = add.data
    assert add.inputs == ("x", "y")
    np.testing.assert_array_equal(x + y, total)


def test_run_writes_and_resumes(tmp_path, capsys, monkeypatch):
    names = ["0_pass", "1_abort", "2_pass"]
    monkeypatch.setattr("run.collect", lambda: [case(name) for name in names])
    out = tmp_path / "results" / "fake.json"
    base = ["--executor", "fake", "--workers", "1", "--out", str(out)]
    assert run.main([*base, "--limit", "2"], {"fake": Fake}) == 0
    report = json.loads(out.read_text())
    assert report["counts"] == {"crash": 1, "pass": 1}
    assert report["cases"]["1_abort"]["reason"].startswith("in stage builder: SIGABRT")
    assert report["versions"]["tensorrt"] == "10.6.0"
    assert run.main([*base, "--resume"], {"fake": Fake}) == 0
    assert "1 of 3 cases" in capsys.readouterr().out
    assert json.loads(out.read_text())["counts"] == {"crash": 1, "pass": 2}
    assert run.main([*base, "--cases", "abort|2"], {"fake": NoLibrary}) == 1
    assert json.loads(out.read_text())["not run"] == ["1_abort", "2_pass"]
    assert "libnvinfer.so.10: not found" in capsys.readouterr().err


def test_on_the_stand_in(tmp_path, capsys):
    """Through jetrt's parser, builder and engine."""
    out = tmp_path / "jetrt.json"
    wanted = "^test_(add|relu|matmul_2d|constant|sequence_insert_at_back)$"
    arguments = ["--executor", "jetrt", "--workers", "1", "--out", str(out), "--cases", wanted]
    assert run.main(arguments) == 0, capsys.readouterr().err
    report = json.loads(out.read_text())
    assert report["versions"]["tensorrt"] == "10.6.0.26"
    assert report["counts"] == {"parser": 1, "pass": 4}
    refused = report["cases"]["test_sequence_insert_at_back"]
    assert refused["error"] == "ModelError"
    assert refused["reason"]


def report(tensorrt="10.6.0", **cases):
    full = {
        name: {"status": status, "reason": reason, "error": error, "gate": gate}
        for name, (status, reason, error, gate) in cases.items()
    }
    versions = {"tensorrt": tensorrt, "onnx": "1.23.1"}
    return {"versions": versions, "not run": [], "cases": full, "counts": {"pass": len(cases)}}


PASS = ("pass", "", "", "")


def test_promises_that_hold():
    binding = report(a=PASS, b=("wrong", "…", "", ""), c=("parser", "…", "", ""), d=("crash", "…", "", ""))
    jetrt = report(
        "10.6.0.26", a=PASS, b=("wrong", "…", "", "ParityError: b"), c=("parser", "…", "ModelError", ""), d=PASS
    )
    assert compare.broken(binding, jetrt) == []
    assert compare.cross_table(binding, jetrt)[0] == "    1  binding pass     jetrt pass"


def test_promises_that_are_broken():
    binding = report(a=PASS, b=PASS, only=PASS)
    jetrt = report("10.7.0.1", a=("run", "bad", "InferenceError", ""), b=("wrong", "1 value", "", "passed"))
    jetrt["cases"]["c"] = {"status": "parser", "reason": "Loop", "error": "", "gate": ""}
    jetrt["cases"]["d"] = {"status": "wrong", "reason": "2 values", "error": "", "gate": ""}
    jetrt["cases"]["f"] = {"status": "shape", "reason": "'x'", "error": "KeyError", "gate": ""}
    jetrt["not run"] = ["e"]
    assert compare.broken(binding, jetrt) == [
        "not comparable: tensorrt 10.6.0 and 10.7.0.1",
        "jetrt: 1 cases were not run",
        "c: in one of the two results only",
        "d: in one of the two results only",
        "f: in one of the two results only",
        "only: in one of the two results only",
        "a: the binding passes; jetrt: run: bad",
        "b: the binding passes; jetrt: wrong: 1 value",
        "b: wrong (1 value), and the parity gate let it pass",
        "c: refused without a typed error: Loop",
        "d: wrong (2 values), and the parity gate was not asked",
        "f: refused without a typed error: KeyError 'x'",
    ]


def test_compare_as_a_command(tmp_path, capsys):
    for name, result in (("binding", report(a=PASS)), ("jetrt", report(a=("parser", "no 'x' 3", "ModelError", "")))):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    arguments = [str(tmp_path / "binding.json"), str(tmp_path / "jetrt.json")]
    assert compare.main([*arguments, "--refusals", str(tmp_path / "refusals.md")]) == 1
    assert "a: the binding passes; jetrt: parser: no 'x' 3" in capsys.readouterr().out
    assert "- **parser**, 1: no … N\n  (a)\n" in (tmp_path / "refusals.md").read_text()
    assert compare.main([arguments[0], arguments[0]]) == 0
    assert "every promise holds" in capsys.readouterr().out


def test_the_summary(tmp_path):
    """What a later run of the binding found takes the place of what it found first."""
    gate = "ParityError: cosine 0, allowed from 0.99999. fp32 rounds too little for this: …"
    results = {
        "binding": report(a=("wrong", "1 value", "", ""), b=("wrong", "2 values", "", "")),
        "again": report(a=PASS),
        "jetrt": report(a=PASS, b=("wrong", "2 values", "", gate)),
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, "seconds": 1.5}))
    files = {name: str(tmp_path / f"{name}.json") for name in ("binding", "jetrt", "again", "summary")}
    more = ["--again", files["again"], "--summary", files["summary"], "--machine", "a GPU"]
    assert compare.main([files["binding"], files["jetrt"], *more]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["binding"]["counts"] == {"pass": 1, "wrong": 1}
    assert found["binding"]["again"] == ["a"]
    assert found["pairs"] == ["1  binding pass     jetrt pass", "1  binding wrong    jetrt wrong"]
    refused = "ParityError: cosine 0, allowed from 0.99999."
    assert found["wrong"] == {"b": {"reason": "2 values", "binding": "wrong", "gate": refused}}
    assert (found["machine"], found["cases"], found["broken promises"]) == ("a GPU", 2, [])


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("no 'x' 3", "no … N"),
        (
            "input 'x' is float64, which no TensorRT tensor can be",
            "input … is float64, which no TensorRT tensor can be",
        ),
        (': creator && "Plugin not found"', 'creator && "Plugin not found"'),
        ("output 0: 1 of 2 differ at [0]: -0.5; expected 1.5e-05", "output N: N of N differ at [N]: -N; expected N"),
    ],
)
def test_reasons_that_count_as_one(reason, group):
    assert compare.grouped(reason) == group
