"""`benches/groot` takes NVIDIA's package and a checkpoint in the place of its stand-ins: how it asks for them."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import groot_rig
import pytest
import standin

SCRIPTS = """
given = []

def setup_tensorrt_engines(policy, trt_engine_path, mode="n17_full_pipeline"):
    given.append((trt_engine_path, mode))
"""
#: What the newest scripts expect; older ones take a string, and have no module of modes, or one without this.
INFERENCE_MODE = enum.Enum("InferenceMode", {"action_head": "action_head"})
NO_MODES: dict[str, dict[str, Any]] = {}
OTHER_MODES = {"gr00t.deployment": {}, "gr00t.deployment.modes": {"BenchmarkMode": None}}
AN_ENUM = {"gr00t.deployment": {}, "gr00t.deployment.modes": {"InferenceMode": INFERENCE_MODE}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Modules with the names of NVIDIA's; the list gets what policies were asked for."""
    calls: list[dict[str, Any]] = []

    def policy(**given: Any) -> Any:
        calls.append(given)
        return groot_rig.policy()

    contents: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("gr00t", "gr00t.data", "gr00t.policy", "transformers")},
        "gr00t.data.embodiment_tags": {"EmbodimentTag": enum.Enum("EmbodimentTag", {"LIBERO_PANDA": "libero_sim"})},
        "gr00t.policy.gr00t_policy": {"Gr00tPolicy": policy},
        "transformers.feature_extraction_utils": {"BatchFeature": standin.BatchFeature},
    }
    add(contents, monkeypatch)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "trt_model_forward", raising=False)
    yield calls
    sys.modules.pop("trt_model_forward", None)


def add(contents: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("modes", "mode"),
    [(NO_MODES, "action_head"), (OTHER_MODES, "action_head"), (AN_ENUM, INFERENCE_MODE.action_head)],
    ids=["no modes", "other modes", "an enum"],
)
def test_a_checkpoint_and_the_scripts_of_the_package(
    asked: list[dict[str, Any]], modes: Any, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sources

    add(modes, monkeypatch)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "trt_model_forward.py").write_text(SCRIPTS)
    bundle = groot_rig.write_bundle(tmp_path / "bundle")
    source = sources.Checkpoint(bundle, "checkpoints/libero_10", "LIBERO_PANDA", tmp_path / "scripts")
    assert (source.s, source.config, source.batch_feature) == (20, groot_rig.CONFIG, standin.BatchFeature)
    assert source.plan("dit") == str(bundle / "dit_bf16.engine")
    policy = source.policy()
    (tag,) = {one.pop("embodiment_tag") for one in asked}
    assert (tag.value, asked) == ("libero_sim", [{"model_path": "checkpoints/libero_10", "device": "cuda"}] * 2)
    source.setup(policy, source.mode)
    assert source.scripts().given == [(str(bundle), mode)]
