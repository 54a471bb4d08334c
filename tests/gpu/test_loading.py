"""Loading on a real GPU: reports, libraries, plans that TensorRT itself must refuse."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys

import pytest

import jetrt
from jetrt import errors

pytestmark = pytest.mark.gpu


def test_table_of_inputs_and_outputs(load) -> None:
    engine = load("dit5")
    assert list(engine.inputs) == [
        "sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask",
    ]  # fmt: skip
    dtypes = [info.dtype for info in engine.inputs.values()]
    assert dtypes == ["bfloat16", "bfloat16", "int64", "bool", "bool"]
    vl = engine.inputs["vl_embs"]
    assert vl.shape == (1, -1, 64)
    assert vl.profile == [((1, 1, 64), (1, 122, 64), (1, 512, 64))]
    assert engine.outputs["output"].shape == (1, 41, 64)
    assert engine.num_profiles == 1
    assert engine.tensorrt_version.startswith("10.")


def test_load_report(load, engines) -> None:
    report = load("conv_fp16").load_report
    assert report["bytes"] == (engines / "conv_fp16.engine").stat().st_size
    assert report["seconds"] > 0


DAMAGED = """
import pickle, sys
import jetrt
try:
    jetrt.Engine(sys.argv[1]).close()
except jetrt.errors.EngineDeserializeError as error:
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    print(error)
"""


def damage(engines, tmp_path, at: int):
    plan = bytearray((engines / "mlp.engine").read_bytes())
    plan[at : at + 64] = b"\xff" * 64
    path = tmp_path / "damaged.engine"
    path.write_bytes(plan)
    return path


@pytest.mark.parametrize("at", [100, 20_000])
def test_damaged_plan_is_refused_or_loads(engines, tmp_path, at) -> None:
    """The header is right, so TensorRT sees it, and may refuse it: its words travel in the error."""
    path = damage(engines, tmp_path, at)
    done = subprocess.run([sys.executable, "-c", DAMAGED, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not done.stdout or "damaged.engine" in done.stdout


def test_checksum_catches_damage_that_crashes_tensorrt(engines, tmp_path) -> None:
    """TensorRT 10.6 itself dies of SIGSEGV on this one: the checksum beside the plan is read before."""
    path = damage(engines, tmp_path, 2000)
    digest = hashlib.sha256((engines / "mlp.engine").read_bytes()).hexdigest()
    path.with_name(path.name + ".sha256").write_text(f"{digest}  mlp.engine\n")
    done = subprocess.run([sys.executable, "-c", DAMAGED, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "its SHA-256 is" in done.stdout


def test_plan_with_a_sha256_beside_it(engines, tmp_path) -> None:
    import hashlib

    plan = (engines / "mlp.engine").read_bytes()
    path = tmp_path / "mlp.engine"
    path.write_bytes(plan)
    sidecar = tmp_path / "mlp.engine.sha256"
    sidecar.write_text(f"{hashlib.sha256(plan).hexdigest()}  mlp.engine\n")
    jetrt.Engine(path).close()
    sidecar.write_text("0" * 64 + "  mlp.engine\n")
    with pytest.raises(errors.EngineDeserializeError, match="sha256"):
        jetrt.Engine(path)
    jetrt.Engine(path, verify="off").close()


def test_tensorrt_lines_reach_logging(engines, caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="jetrt.tensorrt"):
        jetrt.Engine(engines / "mlp.engine").close()
    assert any(record.name.startswith("jetrt.tensorrt") for record in caplog.records)


def test_many_engines_at_once(engines) -> None:
    import torch

    x = torch.randn(8, 64, device="cuda")
    loaded = [jetrt.Engine(engines / "mlp.engine") for _ in range(8)]
    results = [engine(x=x)["y"].clone() for engine in loaded for _ in range(4)]
    for engine in loaded[::2]:
        engine.close()
    results += [engine(x=x)["y"].clone() for engine in loaded[1::2]]
    assert all(torch.equal(result, results[0]) for result in results)
    for engine in loaded:
        engine.close()


def test_shared_context_memory(engines) -> None:
    import torch

    with jetrt.Engine(engines / "conv_fp16.engine") as probe:
        size = probe.device_memory_size
    memory = jetrt.DeviceMemory(size)
    x = torch.randn(4, 3, 64, 64, device="cuda")
    with jetrt.Engine(engines / "conv_fp16.engine") as engine:
        expected = engine(x=x)["y"].clone()
    pair = [jetrt.Engine(engines / "conv_fp16.engine", device_memory=memory) for _ in range(2)]
    for _ in range(5):
        for engine in pair:
            assert torch.equal(engine(x=x)["y"], expected)
    for engine in pair:
        engine.close()
