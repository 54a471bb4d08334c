"""Names of plans, and whether a plan may run on a machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifests import MANIFEST, ORIN, PLAN, put, values

import jetrt
from jetrt import platform, provenance
from jetrt.errors import BuildOptionError, ManifestError, PlanError
from jetrt.provenance import (
    EngineFilenameSchema,
    Machine,
    Manifest,
    Sha256Sidecar,
    check_before_load,
    check_refit,
    differences,
    needs_refit,
    sha256_of,
)

# Names ----------------------------------------------------------------------------------------------------------------

MODELS = st.text(min_size=1, max_size=40).filter(
    lambda m: m.isprintable() and "__" not in m and not re.search(r"[/\\]|^\.", m)
)
VERSIONS = st.lists(st.integers(0, 99), min_size=2, max_size=4).map(lambda n: ".".join(map(str, n)))


@given(
    MODELS,
    st.integers(1, 9999),
    st.none() | VERSIONS | VERSIONS.map("r{}".format) | st.sampled_from(list(platform.JETPACK.values())),
    VERSIONS,
    st.sampled_from(["fp32", "tf32", "fp16", "bf16", "int8", "mixed", "fp8"]),
)
def test_a_name_is_read_back(model: str, sm: int, jetpack: str | None, tensorrt: str, precision: str) -> None:
    schema = EngineFilenameSchema(model, sm, jetpack, tensorrt, precision)
    assert EngineFilenameSchema.parse(str(schema)) == schema
    assert ("_jpnone_" in str(schema)[len(model) :]) == (jetpack is None)


@given(st.text(max_size=60) | st.from_regex(r"\w*__sm\d+_jp\w*_trt[\d.]*_\w*\.engine", fullmatch=True))
def test_any_name_is_read_or_refused(name: str) -> None:
    with contextlib.suppress(BuildOptionError):
        assert str(EngineFilenameSchema.parse(name)) == name


def test_the_name_of_the_seed() -> None:
    assert str(EngineFilenameSchema("det", 87, "6.2", "10.3", "fp16")) == "det__sm87_jp6.2_trt10.3_fp16.engine"
    here = EngineFilenameSchema.for_machine
    assert str(here("det", ORIN, "int8")) == "det__sm87_jp6.2.1_trt10.3.0.30_int8.engine"
    assert here("det", replace(ORIN, jetpack=None, l4t="36.9.1"), "fp16").jetpack == "r36.9.1"
    assert "_jpnone_" in str(here("det", replace(ORIN, jetpack=None, l4t=None), "fp16"))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("", "is empty"),
        ("a__b", "holds two underscores in a row"),
        ("a/b", "holds a path separator"),
        ("..\\b", "holds a path separator"),
        (".b", "begins with a dot"),
        ("a\nb", "cannot be printed"),
        ("\ud800", "cannot be printed"),
        ("ä" * 120, "makes a file name of 277 bytes; at most 230 are allowed"),
    ],
)
def test_a_model_name_that_cannot_stand_in_a_file_name(model: str, problem: str) -> None:
    with pytest.raises(BuildOptionError, match=re.escape(problem)) as caught:
        EngineFilenameSchema(model, 87, "6.2", "10.3.0.30", "fp16")
    assert "name the plan with --engine" in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"sm": 0}, {"jetpack": "none"}, {"jetpack": "6_2"}, {"tensorrt": "10"}, {"precision": "fp_16"}]
)
def test_other_parts_that_cannot_stand_in_a_file_name(change: dict[str, Any]) -> None:
    with pytest.raises(BuildOptionError, match="does not have the form <model>__sm<SM>_jp<JP>_trt<TRT>_<precision>"):
        replace(EngineFilenameSchema("det", 87, "6.2", "10.3.0.30", "fp16"), **change)


# Sidecar --------------------------------------------------------------------------------------------------------------


def test_sidecar_is_what_sha256sum_writes(tmp_path: Path) -> None:
    engine = tmp_path / "a b.engine"
    engine.write_bytes(PLAN)
    assert Sha256Sidecar.read(engine) is None
    sidecar = Sha256Sidecar.of(engine)
    sidecar.write(engine)
    text = (tmp_path / "a b.engine.sha256").read_text()
    assert text == f"{hashlib.sha256(PLAN).hexdigest()}  a b.engine\n"
    assert Sha256Sidecar.read(engine) == sidecar
    sidecar.verify(engine)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b.engine", "a b.engine.sha256"]


@pytest.mark.parametrize("form", ["{D}  det.engine\n", "{d} *det.engine\r\n", " {d}\tdet.engine", "{d}"])
def test_sidecar_is_read_as_the_native_loader_reads_it(tmp_path: Path, form: str) -> None:
    digest = hashlib.sha256(PLAN).hexdigest()
    Sha256Sidecar.path_for(tmp_path / "det.engine").write_text(form.format(d=digest, D=digest.upper()))
    sidecar = Sha256Sidecar.read(tmp_path / "det.engine")
    assert sidecar is not None
    assert sidecar.sha256 == digest
    assert sidecar.name == ("det.engine" if "det" in form else "")


@pytest.mark.parametrize("content", [b"", b"\n", b"ab12  det.engine", b"\xff" * 64, b"g" * 64, b"0" * 65])
def test_sidecar_without_a_digest(tmp_path: Path, content: bytes) -> None:
    Sha256Sidecar.path_for(tmp_path / "det.engine").write_bytes(content)
    with pytest.raises(
        PlanError, match=r"det\.engine\.sha256: no SHA-256 digest in this file\. Write one with sha256sum"
    ):
        Sha256Sidecar.read(tmp_path / "det.engine")


def test_sidecar_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(Sha256Sidecar.path_for(tmp_path / "det.engine"))
    with pytest.raises(PlanError, match=r"cannot read the checksum beside the plan: not a regular file\."):
        Sha256Sidecar.read(tmp_path / "det.engine")


def test_sidecar_of_another_plan(tmp_path: Path) -> None:
    engine = tmp_path / "det.engine"
    engine.write_bytes(PLAN[:-1] + b"?")
    sidecar = Sha256Sidecar(hashlib.sha256(PLAN).hexdigest(), "rec.engine")
    with pytest.raises(
        PlanError, match=r"written for 'rec\.engine'\) says .*: the plan is damaged or was replaced"
    ) as e:
        sidecar.verify(engine)
    assert (e.value.found, e.value.allowed) == (sha256_of(engine), sidecar.sha256)


# Differences between machines -----------------------------------------------------------------------------------------

MACHINES = values(Machine)


@given(MACHINES)
def test_a_plan_runs_where_it_was_built(machine: Machine) -> None:
    assert differences(replace(MANIFEST, machine=machine), machine) == ()


@given(MACHINES, MACHINES)
def test_every_refusal_is_about_a_field_that_differs(a: Machine, b: Machine) -> None:
    found = differences(replace(MANIFEST, machine=a), b)
    names = [d.field for d in found]
    assert len(set(names)) == len(names)
    for d in found:
        assert (d.manifest, d.here) == (getattr(a, d.field), getattr(b, d.field))
        assert d.manifest != d.here
        assert d.refused == (d.field not in ("l4t", "jetpack", "power_mode"))
    for field in ("sm", "sm_count", "gpu", "arch"):
        assert (field in names) == (getattr(a, field) != getattr(b, field))


@pytest.mark.parametrize(
    ("manifest", "here", "refused", "warned"),
    [
        ({}, {"sm": 86}, ["sm"], []),
        ({}, {"sm_count": 8}, ["sm_count"], []),
        ({}, {"gpu": "Thor", "sm": 110, "sm_count": 20}, ["sm", "sm_count", "gpu"], []),
        ({}, {"arch": "x86_64"}, ["arch"], []),
        ({}, {"tensorrt": "10.3.0.31"}, ["tensorrt"], []),
        ({}, {"tensorrt": "10.3.0"}, [], []),  # the build number is not known here
        ({}, {"tensorrt": "10.4.0.30"}, ["tensorrt"], []),
        ({"version_compatible": True}, {"tensorrt": "10.4.0.1"}, [], []),
        ({"version_compatible": True}, {"tensorrt": "11.1.0.106"}, [], []),
        ({"version_compatible": True}, {"tensorrt": "10.2.0.30"}, ["tensorrt"], []),
        ({"hardware_compatibility": "ampere_plus"}, {"sm": 90, "sm_count": 132, "gpu": "H200"}, [], []),
        ({"hardware_compatibility": "ampere_plus"}, {"sm": 80}, [], []),
        ({"hardware_compatibility": "ampere_plus"}, {"sm": 75}, ["sm"], []),
        ({"hardware_compatibility": "same_compute_capability"}, {"sm_count": 8, "gpu": "x"}, [], []),
        ({"hardware_compatibility": "same_compute_capability"}, {"sm": 90}, ["sm"], []),
        ({"driver_floor": "540.4"}, {}, [], []),
        ({"driver_floor": "540.4.1"}, {}, ["driver"], []),
        ({"driver_floor": "540.10"}, {}, ["driver"], []),  # numbers, not text
        ({"driver_floor": "540.4"}, {"driver": None}, [], ["driver"]),
        ({"driver_floor": "540.4"}, {"driver": "?"}, [], ["driver"]),
        ({}, {"driver": "1.0", "cuda": None, "memory_bytes": 1}, [], []),
        ({}, {"jetpack": "6.2", "l4t": "36.4.3", "power_mode": "15W"}, [], ["l4t", "jetpack", "power_mode"]),
        ({}, {"jetpack": None, "l4t": None, "power_mode": None}, [], []),
    ],
)
def test_the_rules(manifest: dict[str, Any], here: dict[str, Any], refused: list[str], warned: list[str]) -> None:
    found = differences(replace(MANIFEST, **manifest), replace(ORIN, **here))
    assert [d.field for d in found if d.refused] == refused
    assert [d.field for d in found if not d.refused] == warned


# Check at load --------------------------------------------------------------------------------------------------------


def unasked() -> Machine:
    raise AssertionError("the machine is asked only when there is something to compare")


def test_nothing_to_check_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.engine").write_bytes(PLAN)
    assert check_before_load(tmp_path / "a.engine", unasked) == []
    Sha256Sidecar("0" * 64, "a.engine").write(tmp_path / "a.engine")
    assert check_before_load(tmp_path / "a.engine", unasked) == []  # the native loader compares this one
    with pytest.raises(ValueError, match='verify is \'on\'; allowed: "auto", "off"'):
        check_before_load(tmp_path / "a.engine", unasked, verify="on")  # type: ignore[arg-type]


def test_a_right_plan(tmp_path: Path) -> None:
    engine = put(tmp_path)
    assert check_before_load(engine, ORIN) == []
    assert check_before_load(engine, lambda: ORIN, tensorrt_plan_version="10.3.0.30") == []
    assert check_before_load(str(engine), replace(ORIN, tensorrt="10.3.0.30")) == []
    Sha256Sidecar.path_for(engine).unlink()
    assert check_before_load(engine, ORIN) == []  # hashed here


def test_a_renamed_plan_is_the_same_plan(tmp_path: Path) -> None:
    engine = put(tmp_path)
    for suffix in ("", ".json", ".sha256"):
        Path(f"{engine}{suffix}").rename(tmp_path / f"other.engine{suffix}")
    assert check_before_load(tmp_path / "other.engine", ORIN) == []


def test_refusal_for_another_machine(tmp_path: Path) -> None:
    engine = put(tmp_path)
    here = replace(ORIN, sm_count=8, gpu="NVIDIA Thor", power_mode="15W", jetpack="6.2")
    expected = f"""\
{engine} was built for another machine and is refused:
  field     in the manifest  here
  sm_count  16               8
  gpu       Orin             NVIDIA Thor
The power mode differs too (MAXN in the manifest, 15W here), and a lower one switches SMs off: set MAXN again with \
nvpmodel, or build for this one.
This builds a right one here:
  jetrt build --onnx 'my model.onnx' --engine det.engine --precision fp16
verify="off" loads it anyway."""
    with pytest.raises(ManifestError) as caught:
        check_before_load(engine, here)
    assert str(caught.value) == expected
    assert caught.value.differences == [("sm_count", 16, 8), ("gpu", "Orin", "NVIDIA Thor")]
    assert caught.value.command == "jetrt build --onnx 'my model.onnx' --engine det.engine --precision fp16"
    assert caught.value.path == str(engine)
    milder = (
        "was built on a machine that was set up differently: jetpack is 6.2, in the manifest 6.2.1, power_mode is 15W"
    )
    first, second = check_before_load(engine, here, verify="off")
    assert first == expected
    assert milder in second
    (only,) = check_before_load(engine, replace(ORIN, power_mode="15W", jetpack="6.2"))
    assert milder in only


def test_the_command_names_the_plan_for_this_machine(tmp_path: Path) -> None:
    name = str(EngineFilenameSchema.for_machine("det", ORIN, "fp16"))
    manifest = replace(
        MANIFEST,
        engine=replace(MANIFEST.engine, file=name),
        command=("jetrt", "build", "--onnx", "m.onnx", "--engine", f"out dir/{name}"),
    )
    here = replace(ORIN, tensorrt="10.16.2.10", jetpack="7.2.1", l4t="39.2.1")
    with pytest.raises(ManifestError) as caught:
        check_before_load(put(tmp_path, manifest), here)
    assert (
        caught.value.command
        == "jetrt build --onnx m.onnx --engine 'out dir/det__sm87_jp7.2.1_trt10.16.2.10_fp16.engine'"
    )
    with pytest.raises(ManifestError, match="came without the command that built it: build it here from its ONNX"):
        check_before_load(put(tmp_path, replace(manifest, command=None)), here)


@pytest.mark.parametrize(
    ("damage", "row"),
    [
        (lambda e: e.write_bytes(PLAN + b"!"), "  size in bytes  23     22"),
        (lambda e: Sha256Sidecar("0" * 64, e.name).write(e), f"{'0' * 64}  {MANIFEST.engine.sha256}"),
        (
            lambda e: (e.write_bytes(PLAN[:-1] + b"!"), Sha256Sidecar.path_for(e).unlink()),
            "  SHA-256 of the plan  ",
        ),
        (
            lambda e: Manifest.path_for(e).write_text(
                replace(MANIFEST, engine=replace(MANIFEST.engine, sha256="2" * 64)).to_json()
            ),
            "2" * 64,
        ),
    ],
    ids=["plan grew", "sidecar edited", "plan edited, sidecar gone", "manifest edited"],
)
def test_a_manifest_that_is_not_of_this_plan(tmp_path: Path, damage: Callable[[Path], Any], row: str) -> None:
    engine = put(tmp_path)
    damage(engine)
    with pytest.raises(ManifestError) as caught:
        check_before_load(engine, unasked)
    message = str(caught.value)
    assert f"{engine}: {engine}.json (written for 'det.engine') is not the manifest of this plan:\n" in message
    assert row in message
    assert "One of the files was edited, copied alone, or left by an interrupted build." in message
    assert caught.value.differences
    # "off" hashes nothing, so that it does not see what only a hash shows.
    warnings = check_before_load(engine, ORIN, verify="off")
    assert warnings == ([] if "SHA-256 of" in row else [message])


def test_one_byte_of_the_plan_is_for_the_native_loader(tmp_path: Path) -> None:
    engine = put(tmp_path)
    engine.write_bytes(PLAN[:-1] + b"!")
    assert check_before_load(engine, ORIN) == []
    with pytest.raises(jetrt.errors.PlanError, match=r"is no TensorRT plan|SHA-256"):
        jetrt.read_plan(engine)
    with pytest.raises(PlanError, match="the plan is damaged or was replaced"):
        Sha256Sidecar(MANIFEST.engine.sha256, engine.name).verify(engine)


def test_the_header_of_the_plan_is_compared(tmp_path: Path) -> None:
    engine = put(tmp_path, replace(MANIFEST, machine=replace(ORIN, tensorrt="11.4.0.300")))
    here = replace(ORIN, tensorrt="11.4.0.300")
    assert check_before_load(engine, here, tensorrt_plan_version=f"11.4.0.{300 % 256}") == []  # one byte of it
    with pytest.raises(ManifestError, match=r"TensorRT in its header +10\.6\.0\.26 +11\.4\.0\.300"):
        check_before_load(engine, here, tensorrt_plan_version="10.6.0.26")


def test_a_damaged_manifest_is_refused_or_told(tmp_path: Path) -> None:
    engine = put(tmp_path)
    Manifest.path_for(engine).write_text("{")
    with pytest.raises(ManifestError, match=r"det\.engine\.json: no JSON"):
        check_before_load(engine, unasked)
    (warning,) = check_before_load(engine, unasked, verify="off")
    assert "no JSON" in warning
    Manifest.path_for(engine).write_text(MANIFEST.to_json())
    Sha256Sidecar.path_for(engine).write_text("edited\n")
    with pytest.raises(ManifestError, match=r"det\.engine\.sha256: no SHA-256 digest in this file"):
        check_before_load(engine, unasked)


def test_a_stripped_plan_needs_a_refit_from_its_onnx(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, stripped=True)
    engine = put(tmp_path, manifest)
    assert needs_refit(manifest)
    assert not needs_refit(MANIFEST)
    text = (
        "was built without weights (--strip-plan) and computes nonsense until it is refitted. Load it with its model: "
    )
    text += "jetrt.Engine('det.engine', refit='my model.onnx')."
    with pytest.raises(ManifestError, match=re.escape(text)):
        check_before_load(engine, ORIN)
    assert check_before_load(engine, ORIN, refit=True) == []
    (warning,) = check_before_load(engine, ORIN, verify="off")
    assert text in warning

    check_refit(manifest, "1" * 64)
    with pytest.raises(ManifestError, match="the ONNX given for the refit has 2222") as caught:
        check_refit(manifest, "2" * 64)
    assert (caught.value.found, caught.value.allowed) == ("2" * 64, "1" * 64)
    with pytest.raises(ManifestError, match="its manifest names no ONNX model"):
        check_refit(replace(manifest, model=None), "1" * 64)


def test_the_check_is_fast(tmp_path: Path) -> None:
    audit = {"layers": [{"name": f"layer {i}", "type": "CONVOLUTION", "share": i / 7} for i in range(200)]}
    engine = put(tmp_path, replace(MANIFEST, audit=audit))
    best = min(_seconds(lambda: check_before_load(engine, ORIN)) for _ in range(20))
    assert best < 2e-3


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_everything_is_exported() -> None:
    assert all(hasattr(provenance, name) for name in provenance.__all__)
