"""`jetrt plan` and loading a set: one arithmetic, refused before a byte is read."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machines
import pytest
import rig
from hypothesis import given
from hypothesis import strategies as st
from manifests import MANIFEST

import fakes
import jetrt
from jetrt import errors, fit
from jetrt.cli import main
from jetrt.fit import MIB, Budget, GpuMemory, Need
from jetrt.provenance import BuildReport, EngineFile, FileHash, Manifest, ModelFile, Tensor

GIB = 1 << 30


@pytest.fixture
def sized(tmp_path: Path) -> Callable[..., Path]:
    """`sized("a.engine", 2.5)`: a plan of about that many MiB, whose engine takes as much."""

    def make(name: str, megabytes: float, **fields: Any) -> Path:
        size = int(megabytes * MIB)
        path = tmp_path / name
        fakes.write_plan(path, "mlp", filler="x" * size, **{"weights_bytes": size, **fields})
        return path

    return make


def with_manifest(path: Path, *, context: int | None = None, **changes: Any) -> Path:
    """A manifest for this machine of stand-ins; `context`: bytes of scratch memory that the build recorded."""
    from jetrt.provenance import Machine

    findings = () if context is None else ({"kind": "memory", "context_bytes": context},)
    values = {
        "engine": EngineFile.of(path),
        "machine": Machine.here(),
        "build": BuildReport(1.0, None, 3, None, findings),
        "inputs": (Tensor("x", "float32", (-1, 64), "device", "kLINEAR"),),
        "outputs": (Tensor("y", "float32", (-1, 10), "device", "kLINEAR"),),
        "profiles": ({"shapes": {"x": {"min": [1, 64], "opt": [8, 64], "max": [64, 64]}}},),
    }
    Manifest.path_for(path).write_text(replace(MANIFEST, **{**values, **changes}).to_json())
    return path


# Arithmetic -----------------------------------------------------------------------------------------------------------

SIZES = st.integers(0, 1 << 40)
NEEDS = st.builds(
    Need,
    st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8),
    SIZES,
    SIZES,
    st.none() | SIZES,
    st.none() | SIZES,
    st.integers(1, 8),
)


@given(st.lists(NEEDS, max_size=5), SIZES, st.none() | SIZES, st.none() | st.floats(0.01, 1))
def test_the_verdict_is_the_sum(engines: list[Need], count: int, reserve: int | None, fraction: float | None) -> None:
    found = fit.check(engines, fit.stated_budget(count, reserve=reserve, torch_fraction=fraction))
    left = count - (reserve or 0) - int((fraction or 0) * count)
    assert found.budget.bytes == max(left, 0)
    assert all(need.certain <= need.likely for need in engines)
    assert (found.verdict == "does not fit") is (sum(n.certain for n in engines) > found.budget.bytes)
    assert (found.verdict == "fits") is (sum(n.likely for n in engines) <= found.budget.bytes)
    likely = [need.likely for need in found.needs]
    assert likely == sorted(likely, reverse=True)
    # The text adds up too.
    mapping = json.loads(json.dumps(found.to_mapping()))
    assert mapping["likely"] == sum(row["likely"] for row in mapping["engines"])
    assert mapping["budget"] == max(sum(term[1] for term in mapping["budget_terms"]), 0)
    assert found.text().splitlines()[-1].startswith("It ")


@given(st.lists(NEEDS, max_size=5), SIZES, SIZES)
def test_a_load_is_refused_by_what_is_certain(engines: list[Need], used: int, allowed: int) -> None:
    total = used + sum(need.certain for need in engines)
    if total <= allowed:
        fit.refuse(engines, used, allowed, "words")
    else:
        with pytest.raises(errors.OutOfMemoryError) as info:
            fit.refuse(engines, used, allowed, "words")
        assert (info.value.requested, info.value.free) == (total, allowed)
        assert "words" in str(info.value)


def test_the_estimate() -> None:
    assert Need("a", 4 * GIB).likely == 5 * GIB
    assert Need("a", MIB, contexts=3).likely == 193 * MIB
    assert Need("a", MIB, scratch=5, tensors=2).likely == MIB + 7
    assert (Need("a", MIB).certain, Need("a", MIB, weights=3, scratch=2).certain) == (MIB, MIB + 5)


def test_the_budget_of_a_machine() -> None:
    orin = GpuMemory(12 * GIB, 16 * GIB, unified=True)
    assert fit.machine_budget(orin).terms == (
        ("available to programs (MemAvailable)", 12 * GIB),
        ("reserve for the system", -(16 * GIB // 20)),
    )
    assert fit.machine_budget(GpuMemory(GIB, 4 * GIB, unified=True)).bytes == GIB // 2  # at least 512 MiB stay
    assert fit.machine_budget(orin, reserve=0).bytes == 12 * GIB
    assert fit.machine_budget(orin, reserve=0, torch_fraction=0.6).terms[-1] == (
        "torch, 60% of the GPU's memory (16.00 GiB)",
        -int(0.6 * 16 * GIB),
    )
    # What torch took is not free any more, and is not taken off twice.
    assert fit.machine_budget(orin, reserve=0, torch_fraction=0.5, torch_has=2 * GIB).terms[-1] == (
        "torch, 50% of the GPU's memory (16.00 GiB) less 2.00 GiB that it has",
        -6 * GIB,
    )
    assert fit.machine_budget(orin, reserve=0, torch_fraction=0.5, torch_has=9 * GIB).bytes == 12 * GIB
    card = GpuMemory(20 * GIB, 24 * GIB, unified=False)
    assert fit.machine_budget(card).terms == (("free on the GPU", 20 * GIB),)
    for fraction in (0, 1.5, -1, True):
        with pytest.raises(ValueError, match=r"^torch_fraction: found .*; allowed: a number above 0 and up to 1"):
            fit.machine_budget(card, torch_fraction=fraction)


def test_the_engines_of_an_orin_nx() -> None:
    """The set of a policy with two engines on 16 GB: both fit alone, not beside the whole of torch's cap."""
    engines = [Need("dit.engine", 2_200_000_000), Need("backbone.engine", 3_080_000_000)]
    orin = GpuMemory(14 * GIB, 15 * GIB, unified=True)
    alone = fit.check(engines, fit.machine_budget(orin))
    assert (alone.verdict, [need.name for need in alone.needs]) == ("fits", ["backbone.engine", "dit.engine"])
    beside = fit.check(engines, fit.machine_budget(orin, torch_fraction=0.6))
    assert beside.verdict == "does not fit"
    assert beside.text().splitlines()[-1].startswith("It does not fit: at least 4.92 GiB of 4.25 GiB for engines.")


def test_the_text_shows_the_arithmetic() -> None:
    engines = [Need("/x/big.engine", 3 * GIB, scratch=GIB, tensors=0), Need("small.engine", GIB)]
    text = fit.check(engines, Budget((("budget", 8 * GIB), ("reserve for the system", -GIB)))).text()
    assert text == (
        "load order    plan      scratch    inputs, outputs  together  by\n"
        "big.engine    3.00 GiB  1.00 GiB   0                4.00 GiB  manifest\n"
        "small.engine  1.00 GiB  256.0 MiB  unknown          1.25 GiB  estimated\n"
        "\n"
        "                                    left\n"
        "budget                    8.00 GiB  8.00 GiB\n"
        "- reserve for the system  1.00 GiB  7.00 GiB\n"
        "- big.engine              4.00 GiB  3.00 GiB\n"
        "- small.engine            1.25 GiB  1.75 GiB\n"
        f"\n{fit.ESTIMATE}\n"
        "\n"
        "It should fit, by estimates: 5.25 GiB of 7.00 GiB for engines."
    )


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_manifests_tell(sized: Any) -> None:
    plain, known = sized("a.engine", 1), with_manifest(sized("b.engine", 2), context=3 * MIB)
    first, second = fit.needs([known, plain], contexts=2)
    assert (first.name, first.estimated, first.tensors) == ("a.engine", True, None)  # 128 MiB by the estimate
    assert (second.name, second.scratch, second.tensors) == ("b.engine", 6 * MIB, 64 * 64 * 4)


def test_a_stripped_plan_gets_its_weights(sized: Any, tmp_path: Path) -> None:
    path = sized("a.engine", 1)
    (tmp_path / "m.onnx").write_bytes(bytes(1000))
    model = ModelFile("m.onnx", "1" * 64, (FileHash("w.bin", "2" * 64, 5000),), 17, None)
    with_manifest(path, stripped=True, refittable=True, model=model)
    (need,) = fit.needs(path)
    assert need.weights == 6000
    assert need.certain == need.plan + 6000
    assert "refit" in fit.check([need], Budget((("budget", GIB),))).text()


def test_damaged_profiles_and_manifests(sized: Any, tmp_path: Path) -> None:
    path = with_manifest(sized("a.engine", 1), profiles=({"shapes": {"x": {"max": ["?"]}}}, {"shapes": 5}, {}))
    assert fit.needs(path)[0].tensors == 0
    Manifest.path_for(path).write_text("{")
    with pytest.raises(errors.ManifestError, match=r"a\.engine\.json"):
        fit.needs(path)


def test_each_plan_counts_once(sized: Any, tmp_path: Path) -> None:
    path = sized("a.engine", 1)
    link = tmp_path / "link.engine"
    link.symlink_to(path)
    assert len(fit.needs([path, link, tmp_path, tmp_path / "." / "a.engine"])) == 1
    with pytest.raises(FileNotFoundError, match=r"no\.engine"):
        fit.needs([path, tmp_path / "no.engine"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the folder has no plan; allowed: \*\.engine, \*\.trt, \*\.plan"):
        fit.needs(tmp_path / "empty")


# The machine's memory -------------------------------------------------------------------------------------------------


def test_memory_of_a_card() -> None:
    before = rig.cuda().all_live()
    memory = fit.gpu_memory()
    assert memory == GpuMemory(memory.free, 8 * GIB, unified=False)
    assert 0 < memory.free <= memory.total
    assert rig.cuda().all_live() == before
    with pytest.raises(errors.CudaError, match=r"cuDeviceGet failed with CUDA error 101. `jetrt doctor`"):
        fit.gpu_memory(77)


def test_memory_of_a_jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    """What files tell needs no driver; where they tell nothing, the driver says that memory is shared."""
    monkeypatch.setattr(fit.platform, "meminfo", lambda: {"MemAvailable": 5 * GIB, "MemTotal": 8 * GIB})
    orin = fit.platform.Platform("aarch64", integrated=True, memory_available=5 * GIB, memory_total=8 * GIB)
    unknown = replace(orin, integrated=None)
    monkeypatch.setattr(fit.platform, "identify", lambda: unknown)
    assert not fit.gpu_memory().unified
    rig.cuda().set("integrated", 1)
    try:
        assert fit.gpu_memory() == GpuMemory(5 * GIB, 8 * GIB, unified=True)
    finally:
        rig.cuda().set("integrated", 0)
    monkeypatch.setattr(fit.platform, "identify", lambda: orin)
    monkeypatch.setattr(fit, "_driver", lambda: pytest.fail("the driver was opened"))
    assert fit.gpu_memory() == GpuMemory(5 * GIB, 8 * GIB, unified=True)


# Loading --------------------------------------------------------------------------------------------------------------


def test_largest_first(sized: Any) -> None:
    paths = [sized("small.engine", 1), sized("large.engine", 5), sized("middle.engine", 3)]
    engines = fit.load_engines([*paths, paths[0]], graphs="off")
    assert [Path(name).name for name in engines] == ["large.engine", "middle.engine", "small.engine"]
    assert set(engines) == {str(path) for path in paths}
    assert all(isinstance(engine, jetrt.Engine) for engine in engines.values())
    for engine in engines.values():
        engine.close()


def test_refused_before_a_byte_is_read(sized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [sized("a.engine", 3), sized("b.engine", 2)]
    opened: list[Any] = []
    monkeypatch.setattr(fit._core, "Engine", lambda *args, **kwargs: opened.append(args))
    for path in paths:
        path.chmod(0)  # whoever reads it fails, unless it is root
    with pytest.raises(errors.OutOfMemoryError) as info:
        fit.load_engines(paths, "4M")
    assert str(info.value).startswith(
        "these engines do not fit: a.engine 3.0 MiB + b.engine 2.0 MiB = 5.0 MiB; memory_budget is 4.0 MiB, and 8.00 "
        "GiB are free (a plan takes at least its own size on the GPU). Nothing was read."
    )
    with pytest.raises(errors.OutOfMemoryError, match=r"memory_budget is 8\.0 MiB - 4\.0 MiB torch, 50% of the budget"):
        fit.load_engines(paths, "8M", torch_fraction=0.5)
    assert opened == []


def test_what_torch_holds_in_this_process_counts_once(sized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sized("a.engine", 1)
    asked: list[dict[str, Any]] = []
    allowance = fit.allowance

    def spy(*arguments: Any, **keywords: Any) -> tuple[int, str]:
        asked.append(keywords)
        return allowance(*arguments, **keywords)

    monkeypatch.setattr(fit, "allowance", spy)
    for cuda, held in (
        (SimpleNamespace(is_initialized=lambda: True, memory_reserved=lambda device: (device + 1) << 20), MIB),
        (SimpleNamespace(is_initialized=lambda: False), 0),
    ):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        with monkeypatch.context() as patch:
            patch.setattr(fit._core, "Engine", lambda *_, **__: SimpleNamespace(close=lambda: None))
            fit.load_engines(path, torch_fraction=0.5)
        assert asked.pop() == {"torch_fraction": 0.5, "torch_has": held}


def test_what_was_recorded_counts(sized: Any) -> None:
    path = with_manifest(sized("a.engine", 1), context=30 * MIB)
    with pytest.raises(errors.OutOfMemoryError, match=r"a\.engine 31\.0 MiB"):
        fit.load_engines(path, "16M")
    with pytest.raises(errors.OutOfMemoryError, match=r"a\.engine 61\.0 MiB"):
        fit.load_engines(path, "40M", max_contexts=2)


def test_engines_that_take_more_than_was_known(sized: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What the first takes besides its plan leaves no room for the second: both are closed again."""
    paths = [sized("a.engine", 3, device_memory=8 * MIB), sized("b.engine", 2)]
    before = rig.trt().live("ICudaEngine")
    with (
        caplog.at_level(logging.WARNING, "jetrt.fit"),
        pytest.raises(errors.OutOfMemoryError, match=r"taken by those loaded so far \+ b\.engine.*are closed again"),
    ):
        fit.load_engines(paths, 6 * MIB)
    assert "It may not fit: the plans alone take 5.0 MiB" in caplog.text
    assert rig.trt().live("ICudaEngine") == before


def test_one_that_cannot_be_loaded_closes_the_others(sized: Any) -> None:
    before = rig.trt().live("ICudaEngine")
    with pytest.raises(errors.JetrtError, match="bad"):
        fit.load_engines([sized("good.engine", 2), sized("bad.engine", 1, fail="deserialize")])
    assert rig.trt().live("ICudaEngine") == before


def test_a_budget_that_is_none(sized: Any) -> None:
    path = sized("a.engine", 1)
    for budget in ("many", -1, 1.5, "0"):
        with pytest.raises(ValueError, match=r"^memory_budget: found .*; allowed: bytes, or a size"):
            fit.load_engines(path, budget)  # type: ignore[arg-type]


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(sized: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sized("a.engine", 1)
    sized("b.plan", 3)
    assert main(["plan", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.index("b.plan") < text.index("a.engine")
    assert "free on the GPU" in text
    assert "It should fit, by estimates" in text
    assert (
        main(["plan", str(tmp_path), "--budget", "16GiB", "--torch-fraction", "0.6", "--reserve", "1G", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "fits"
    assert [term[1] for term in found["budget_terms"]] == [16 * GIB, -GIB, -int(0.6 * 16 * GIB)]
    assert [Path(row["path"]).name for row in found["engines"]] == ["b.plan", "a.engine"]


@pytest.mark.parametrize(("budget", "words"), [("100M", "It may not fit"), ("3M", "It does not fit")])
def test_the_exit_code(sized: Any, capsys: pytest.CaptureFixture[str], budget: str, words: str) -> None:
    paths = [str(sized("a.engine", 1)), str(sized("b.engine", 3))]
    assert main(["plan", *paths, "--budget", budget]) == 1
    assert words in capsys.readouterr().out
    assert main(["plan", paths[0], paths[0], "--budget", "1G"]) == 0
    assert capsys.readouterr().err == "1 of the files named is one of the others and counts once.\n"


def test_files_that_are_no_plans(sized: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sized("a.engine", 1)
    (tmp_path / "b.engine").write_bytes(b"")
    assert main(["plan", str(tmp_path), "--budget", "1G"]) == 1
    assert "PlanError" in (line := capsys.readouterr().err)
    assert "b.engine" in line
    assert "empty file" in line
    (tmp_path / "none").mkdir()
    assert main(["plan", str(tmp_path / "none")]) == 1
    assert "the folder has no plan" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "no.engine")]) == 1
    assert "no.engine" in capsys.readouterr().err


def test_a_file_that_cannot_be_read(sized: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = sized("a.engine", 1)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root reads every file
    try:
        assert main(["plan", str(path), "--budget", "1G"]) == 1
    finally:
        if root:
            os.seteuid(0)
    assert "PermissionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "lots"], "argument --budget: 'lots': allowed: bytes, or a size such as 512M or 2G"),
        (["--budget", "-5G"], "argument --budget: expected one argument"),
        (["--budget", "0"], "argument --budget: '0': allowed: bytes, or a size"),
        (["--torch-fraction", "60"], "argument --torch-fraction: '60': allowed: a number above 0 and up to 1"),
        (["--torch-fraction", "0.0"], "argument --torch-fraction: '0.0': allowed: a number above 0 and up to 1"),
        (["--contexts", "0"], "argument --contexts: '0' is not a whole number of at least 1"),
    ],
)
def test_a_command_line_that_makes_no_sense(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "a.engine", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_a_budget_must_be_stated(
    sized: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(sized("a.engine", 1))
    monkeypatch.setattr(fit.ctypes, "CDLL", _no_library)
    assert main(["plan", path]) == 2
    told = capsys.readouterr().err
    assert "libcuda.so.1 cannot be opened (no such file)" in told
    assert told.endswith("Here: --budget 16GiB.\n")
    assert main(["plan", path, "--budget", "1G"]) == 0


def _no_library(name: str) -> Any:
    raise OSError("no such file")


def test_a_set_of_another_boards_files(tmp_path: Path) -> None:
    """Planned on a workstation for another machine: plans of any TensorRT count."""
    machines.plan(tmp_path, version="8.6.2.3")
    assert main(["plan", str(tmp_path), "--budget", "8G"]) == 0
