"""`--opt-level auto` from end to end: levels that crash, hang, differ or are slower, on the stand-ins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import fakes
import jetrt
from jetrt.builder import levels
from jetrt.cli import main
from jetrt.errors import BuildCrashError, EngineBuildError, ModelError

SHAPES = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
FILES = ["m.engine", "m.engine.json", "m.engine.sha256", "m.onnx"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def build(folder: Path, faults: dict[str, Any], **more: Any) -> Any:
    """`faults` by level."""
    fakes.onnx_model(folder / "m.onnx", build={"levels": faults})
    options: dict[str, Any] = {"opt_level": "auto", "progress": "none", **SHAPES, **more}
    return jetrt.build(folder / "m.onnx", folder / "m.engine", **options)


def rows(result: Any) -> dict[int, dict[str, Any]]:
    return {row["level"]: row for row in result.manifest.levels["rows"]}


def states(result: Any) -> dict[int, str]:
    return {level: row["state"] for level, row in rows(result).items()}


def built_level(path: Path) -> int:
    return int(fakes.plan_content(path)["built"]["BuilderOptimizationLevel"])


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_fastest_is_published(folder):
    result = build(folder, {"2": {"ms": 0.6}, "3": {"ms": 0.6}, "4": {"ms": 0.3}, "5": {"ms": 1}})
    assert states(result) == {2: "slower", 3: "slower", 4: "chosen", 5: "slower"}
    assert built_level(result.path) == 4
    assert result.manifest.build.level == result.manifest.levels["chosen"] == 4
    assert all(row["runs"] >= levels.MIN_RUNS and row["parity"] == "passed" for row in rows(result).values())
    assert 0.3e-3 < rows(result)[4]["median"] < 0.6e-3
    assert re.search(r"^3 \(default\) +slower .* against level 4$", result.tables["levels"], re.M)
    assert left(folder) == FILES


def test_slower_never_wins(folder):
    result = build(folder, {"2": {"ms": 0.6}, "3": {"ms": 0.3}}, levels=(2, 3))
    assert states(result) == {2: "slower", 3: "chosen"}
    assert built_level(result.path) == 3


def test_what_is_wrong_with_a_level(folder):
    cask = "Cask unknown internal error"
    faults = {
        "2": {"outcome": "crash", "log": [[2, "about to crash"]]},
        "4": {"differ": True, "ms": 0.01},
        "5": {"run": "crash", "every": 7},
        "1": {"fail": "enqueue", "every": 5, "run_log": [[1, cask]]},
    }
    result = build(folder, faults, levels=(1, 2, 3, 4, 5))
    found = rows(result)
    assert states(result) == {1: "failed", 2: "failed", 3: "chosen", 4: "failed", 5: "failed"}
    assert (found[2]["stage"], found[2]["how"]) == ("build", "crash")
    assert "it crashed (SIGSEGV)" in found[2]["reason"]
    assert "about to crash" in found[2]["log"]
    assert (found[4]["stage"], found[4]["how"]) == ("compare", "mismatch")
    assert "output 'y'" in found[4]["reason"]
    assert (found[5]["stage"], found[5]["how"]) == ("run", "crash")
    assert (found[1]["stage"], found[1]["how"]) == ("run", "error")
    assert "Known failure 'cask'" in found[1]["reason"]
    assert built_level(result.path) == 3
    assert left(folder) == FILES


def test_a_level_that_hangs(folder):
    faults = {"2": {"outcome": "hang"}, "4": {"run": "hang", "every": 20}}
    result = build(folder, faults, levels=(2, 3, 4), level_timeout=6)
    found = rows(result)
    assert [(found[n]["state"], found[n]["stage"], found[n]["how"]) for n in (2, 4)] == [
        ("failed", "build", "timeout"),
        ("failed", "run", "timeout"),
    ]
    assert re.search(r"in phase 'build': it did not end within [\d.]+ s\.", found[2]["reason"])
    assert states(result)[3] == "chosen"


def test_the_default_level_may_fail(folder):
    result = build(folder, {"3": {"differ": "nan"}, "2": {"ms": 0.3}, "4": {"ms": 0.6}}, levels=(2, 3, 4))
    assert states(result) == {2: "chosen", 3: "failed", 4: "slower"}
    assert built_level(result.path) == 2


def test_all_fail(folder):
    faults = {"2": {"outcome": "crash"}, "3": {"differ": 0.5}, "4": {"fail": "enqueue"}, "5": {"outcome": "null"}}
    with pytest.raises(EngineBuildError, match="no optimisation level gave a plan that can be trusted:\n") as caught:
        build(folder, faults)
    text = str(caught.value)
    assert re.search(r"^2 +failed .*it crashed \(SIGSEGV\)", text, re.M)
    assert re.search(r"^3 \(default\) +failed .*output 'y'", text, re.M)
    assert "Try --opt-level 0 or 1, another precision, or another TensorRT version." in text
    assert [row["state"] for row in caught.value.levels["rows"]] == ["failed"] * 4
    assert left(folder) == ["m.onnx"]
    # Nothing worked, so nothing is held against the levels.
    assert not (folder.parent / "cache" / "jetrt" / "levels.json").exists()


def test_a_crash_is_remembered(folder):
    crash = {"2": {"outcome": "crash"}, "4": {"run": "abort"}}
    result = build(folder, crash, levels=(2, 3, 4))
    assert states(result) == {2: "failed", 3: "chosen", 4: "failed"}
    memory = json.loads((folder.parent / "cache" / "jetrt" / "levels.json").read_text())
    ((entry),) = memory["entries"].values()
    assert set(entry["levels"]) == {"2", "4"}
    assert entry["tensorrt"] == fakes.VERSION
    again = build(folder, crash, levels=(2, 3, 4), rebuild=True)
    assert states(again) == {2: "remembered", 3: "chosen", 4: "remembered"}
    assert re.match(
        r"An earlier run saw a crash \(build, [-\dT:]+Z\)\. --retry-levels tries it again\.$", rows(again)[2]["reason"]
    )
    retried = build(folder, crash, levels=(2, 3, 4), rebuild=True, retry_levels=True)
    assert states(retried) == {2: "failed", 3: "chosen", 4: "failed"}
    # Another model is not the same crash.
    (folder / "other").mkdir()
    assert states(build(folder / "other", {"5": {"ms": 1}}, levels=(2, 3))) != states(again)


def test_all_remembered(folder):
    build(folder, {"2": {"outcome": "crash"}}, levels=(2, 3))
    memory = folder.parent / "cache" / "jetrt" / "levels.json"
    content = json.loads(memory.read_text())
    ((entry),) = content["entries"].values()
    entry["levels"]["3"] = entry["levels"]["2"]
    memory.write_text(json.dumps(content))
    with pytest.raises(EngineBuildError, match="no optimisation level gave a plan") as caught:
        build(folder, {"2": {"outcome": "crash"}}, levels=(2, 3), rebuild=True)
    assert "--retry-levels tries those again that an earlier run remembers." in str(caught.value)
    assert left(folder) == FILES  # the plan that was there stays


def test_limit_of_all_levels(folder):
    result = build(folder, {"2": {"outcome": "hang"}}, levels=(2, 3, 4), levels_timeout=8)
    assert states(result) == {2: "failed", 3: "chosen", 4: "not tried"}
    assert rows(result)[2]["how"] == "timeout"
    assert rows(result)[4]["reason"] == "The time for all levels was over."


@pytest.mark.parametrize("fault", [{"outcome": "hang"}, {"run": "hang"}])
def test_timeout_of_the_whole_build(folder, fault):
    with pytest.raises(EngineBuildError, match="no optimisation level gave a plan") as caught:
        build(folder, {"3": fault}, levels=(3,), timeout=5)
    assert "did not end within" in str(caught.value)
    assert left(folder) == ["m.onnx"]


def test_a_model_that_is_refused_ends_it(folder):
    fakes.onnx_model(
        folder / "m.onnx",
        {
            "nodes": [fakes.node("Bogus", ["x"], ["y"])],
            "inputs": [("x", "float32", [1, 4])],
            "outputs": [("y", "float32", [1, 4])],
        },
    )
    with pytest.raises(ModelError, match="Bogus"):
        jetrt.build(folder / "m.onnx", folder / "m.engine", opt_level="auto", progress="none")
    assert left(folder) == ["m.onnx"]


def test_parity_off(folder):
    result = build(folder, {"2": {"differ": True, "ms": 0.3}, "3": {"ms": 0.6}}, levels=(2, 3), parity=False)
    assert states(result) == {2: "chosen", 3: "slower"}  # as asked: nothing is compared
    assert result.manifest.parity.state == "not run"
    assert rows(result)[2]["parity"] == "not run"


def test_the_command_prints_and_stores_the_table(folder, capsys):
    fakes.onnx_model(folder / "m.onnx", build={"levels": {"2": {"ms": 0.6}, "3": {"ms": 0.3}}})
    command = ["build", "--onnx", str(folder / "m.onnx"), "--engine", str(folder / "m.engine"), "--progress", "none"]
    shapes = ["--min", "x:1x64", "--opt", "x:8x64", "--max", "x:64x64"]
    assert main([*command, *shapes, "--opt-level", "auto", "--levels", "2-3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^levels\nlevel +build s +runs +parity +median ms +spread ms +reason\n2 +slower ", printed, re.M)
    assert re.search(r"^3 \(default\)  chosen ", printed, re.M)
    stored = json.loads((folder / "m.engine.json").read_text())
    assert stored["levels"]["chosen"] == stored["build"]["level"] == 3
    assert stored["options"]["opt_level"] == "auto"


def test_ctrl_c_ends_the_search(folder, monkeypatch):
    """And not the level alone."""
    from jetrt.builder import pipeline

    job = pipeline.explained_job

    def interrupted(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "trial":
            raise BuildCrashError("it was stopped by Ctrl-C", how="interrupted")
        return job(name, *arguments, **more)

    monkeypatch.setattr(pipeline, "explained_job", interrupted)
    with pytest.raises(BuildCrashError, match="stopped by Ctrl-C"):
        build(folder, {}, levels=(2, 3))
    assert left(folder) == ["m.onnx"]
