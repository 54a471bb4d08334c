"""`check_bundle`: files, metadata, batch, engines and policy, everything that is wrong in one error (seam C)."""

from __future__ import annotations

import copy
import enum
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import groot_rig
import pytest
import rig
from groot_rig import CONFIG, backbone_plans, dit_io, head_plans, metadata, write_bundle

from fakes import tensor
from jetrt.errors import JetrtError
from jetrt.groot import BundleError, MissingPlanError, check_bundle, load_report, preload, preloading
from jetrt.groot.bundle import OPTIONAL, REQUIRED, REQUIRED_KEYS

pytestmark = pytest.mark.usefixtures("clean")

HEAD = ["action_decoder", "action_encoder", "dit", "state_encoder"]


@pytest.fixture(autouse=True)
def nothing_left(clean: None) -> Any:
    yield
    preloading.drop_all()


def problems(folder: Path, mode: str = "action_head", policy: Any = None, **more: Any) -> list[str]:
    with pytest.raises(BundleError) as info:
        check_bundle(folder, mode, policy, **more)
    found = info.value.problems
    assert found
    for problem in found:
        assert problem in str(info.value)
    assert str(folder) in str(info.value)
    return found


def spoilt(plan: str, port: str, /, **fields: Any) -> dict[str, dict[str, Any]]:
    """The head's plans with other fields for one input or output."""
    plans = copy.deepcopy(head_plans())
    (found,) = [io for io in plans[plan]["io"] if io["name"] == port]
    found.update(fields)
    return plans


# Modes and files ------------------------------------------------------------------------------------------------------


def test_a_whole_bundle_passes(tmp_path: Path) -> None:
    policy = groot_rig.policy()
    found = check_bundle(write_bundle(tmp_path / "b"), "action_head", policy)
    assert sorted(found.plans) == HEAD
    assert (found.mode, found.batch_size) == ("action_head", 1)
    assert found.metadata == metadata()
    assert found.notes == []
    assert rig.trt().live("ICudaEngine") == 0
    assert len(load_report()) >= 4


def test_an_unknown_mode_is_a_value_error(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    with pytest.raises(ValueError, match=r"^Unknown mode: found 'all'; allowed: 'dit_only', 'action_head'"):
        check_bundle(folder, "all")


def test_the_mode_may_be_the_scripts_enum(tmp_path: Path) -> None:
    class Mode(str, enum.Enum):
        action_head = "action_head"

    assert check_bundle(write_bundle(tmp_path / "b"), Mode.action_head).mode == "action_head"


@pytest.mark.parametrize(
    ("mode", "required", "optional"),
    [
        ("dit_only", ["dit"], []),
        ("action_head", HEAD, []),
        ("vit_llm_only", ["llm", "vit"], []),
        ("n17_full_pipeline", HEAD, ["llm", "vit", "vl_self_attention"]),
        ("full_pipeline", [*HEAD, "llm"], ["vit"]),
    ],
)
def test_files_by_mode(mode: str, required: list[str], optional: list[str], tmp_path: Path) -> None:
    assert sorted(REQUIRED[mode]) == sorted(required)
    assert sorted(OPTIONAL.get(mode, {})) == optional
    plans = {**head_plans(), **backbone_plans(n17=mode != "full_pipeline")}
    vl = [tensor("hidden_states", "input", "bfloat16", [1, -1, 64], [([1, 1, 64], [1, 20, 64], [1, 64, 64])])]
    vl.append(tensor("output", "output", "bfloat16", [1, -1, 64]))
    plans["vl_self_attention.engine"] = {"program": "copy", "io": vl}
    whole = write_bundle(tmp_path / "whole", plans)
    assert sorted(check_bundle(whole, mode).plans) == sorted([*required, *optional])
    for role, names in REQUIRED[mode].items():
        present = {name: plan for name, plan in plans.items() if name not in names}
        folder = write_bundle(tmp_path / f"without_{role}", present)
        with pytest.raises(MissingPlanError, match="is missing") as info:
            check_bundle(folder, mode)
        assert isinstance(info.value, FileNotFoundError)
        assert names[0] in str(info.value)
        assert "state_encoder.engine" not in str(info.value) or role == "state_encoder"


def test_what_torch_computes_instead_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "jetrt.groot"):
        found = check_bundle(write_bundle(tmp_path / "b"), "n17_full_pipeline")
    assert found.notes == [
        "vit.engine is not there: torch computes the vit",
        "llm_bf16.engine is not there: torch computes the llm",
        "vl_self_attention.engine is not there: torch computes the vl_self_attention",
    ]
    assert all(note in caplog.text for note in found.notes)


def test_a_pipeline_that_was_exported_whole_needs_its_vision_engine(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", meta=metadata(export_mode="full_pipeline"))
    with pytest.raises(MissingPlanError, match=r"vit\.engine is missing \(nor is there vit_bf16\.engine\)"):
        check_bundle(folder, "n17_full_pipeline")


@pytest.mark.parametrize("name", ["dit_bf16.engine", "dit_model_bf16.engine", "dit_model_bf16.trt"])
def test_the_dit_has_three_names(name: str, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", {name: head_plans()["dit_bf16.engine"]})
    assert check_bundle(folder, "dit_only").plans == {"dit": folder / name}


def test_the_legacy_name_of_the_vision_engine(tmp_path: Path) -> None:
    plans = backbone_plans()
    plans["vit_bf16.engine"] = plans.pop("vit.engine")
    assert check_bundle(write_bundle(tmp_path / "b", plans), "vit_llm_only").plans["vit"].name == "vit_bf16.engine"


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingPlanError, match=r"no folder is there, and .*dit_bf16\.engine") as info:
        check_bundle(tmp_path / "nowhere", "action_head")
    assert (info.value.errno, info.value.filename) == (2, str(tmp_path / "nowhere"))


def test_n1_5_files_by_precision(tmp_path: Path) -> None:
    names = ["vit_fp8", "llm_nvfp4", "vlln_vl_self_attention", "state_encoder", "action_encoder", "DiT_fp8"]
    names += ["action_decoder"]
    folder = write_bundle(tmp_path / "b", {f"{name}.engine": {**head_plans()["dit_bf16.engine"]} for name in names})
    assert sorted(check_bundle(folder, "n1.5").plans) == sorted(names)
    with pytest.raises(MissingPlanError, match=r"DiT_fp16\.engine is missing"):
        check_bundle(folder, "n1.5", precisions={"dit": "fp16"})


# Metadata -------------------------------------------------------------------------------------------------------------


def test_metadata_of_the_folder_beside(tmp_path: Path) -> None:
    """Bundles whose metadata was left with the ONNX files."""
    folder = write_bundle(tmp_path / "engines")
    (tmp_path / "onnx").mkdir()
    (folder / "export_metadata.json").rename(tmp_path / "onnx" / "export_metadata.json")
    assert check_bundle(folder, "action_head").metadata == metadata()


def test_no_metadata_is_a_note(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    (folder / "export_metadata.json").unlink()
    found = check_bundle(folder, "action_head", groot_rig.policy())
    assert found.metadata is None
    assert found.notes == ["no export_metadata.json: batch size and sequence lengths are taken from the engines"]


@pytest.mark.parametrize(("text", "found"), [("{ not json", "cannot be read"), ("[1]", "found a JSON list")])
def test_damaged_metadata(tmp_path: Path, text: str, found: str) -> None:
    folder = write_bundle(tmp_path / "b")
    (folder / "export_metadata.json").write_text(text)
    assert any(found in problem for problem in problems(folder))


@pytest.mark.parametrize("version", [2, 0, "1"])
def test_an_unknown_layout_of_the_metadata(tmp_path: Path, version: Any) -> None:
    folder = write_bundle(tmp_path / "b", meta=metadata(schema_version=version))
    assert f"export_metadata.json: found schema_version {version!r}; allowed: 1, or none" in problems(folder)


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_metadata_of_this_layout_is_complete(tmp_path: Path, key: str) -> None:
    folder = write_bundle(tmp_path / "b", meta=metadata(**{key: None}))
    assert f"export_metadata.json: {key} missing" in problems(folder)
    # N1.6's exporter writes fewer keys and no version.
    meta = metadata(schema_version=None, batch_size=None, num_patches=None, num_vis_tokens=None)
    assert check_bundle(write_bundle(tmp_path / "n16", meta=meta), "action_head").batch_size == 1


@pytest.mark.parametrize("value", [0, -1, "four", 4.5, True])
def test_numbers_are_numbers(tmp_path: Path, value: Any) -> None:
    folder = write_bundle(tmp_path / "b", meta=metadata(hidden_size=value))
    expected = f"export_metadata.json: hidden_size: found {value!r}; allowed: a whole number from 1"
    assert expected in problems(folder)


def test_the_sequence_is_one_longer_than_the_horizon(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", meta=metadata(sa_seq_len=99))
    found = problems(folder)
    assert "export_metadata.json: sa_seq_len is 99, and action_horizon 4 makes it 5" in found


def test_the_grid_of_the_views(tmp_path: Path) -> None:
    plans = {**head_plans(), **backbone_plans()}
    right = write_bundle(tmp_path / "right", plans, metadata(vit_grid_thw=[[1, 4, 4]]))
    check_bundle(right, "n17_full_pipeline")
    other = write_bundle(tmp_path / "other", plans, metadata(vit_grid_thw=[[1, 4, 8]]))
    found = problems(other, "n17_full_pipeline")
    assert "export_metadata.json: num_patches is 16, and vit_grid_thw [[1, 4, 8]] has 32 patches" in found
    assert any(
        p.startswith("patches of a batch: export_metadata.json's vit_grid_thw has 32, and vit.engine") for p in found
    )
    broken = write_bundle(tmp_path / "broken", plans, metadata(vit_grid_thw=[1, 4, 4]))
    assert any("allowed: rows of three numbers" in p for p in problems(broken, "n17_full_pipeline"))


# Batch ----------------------------------------------------------------------------------------------------------------


def test_the_batch_of_the_metadata_is_that_of_the_engines(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", meta=metadata(batch_size=4))
    found = problems(folder)
    assert "batch_size: export_metadata.json has 4, and dit_bf16.engine: input sa_embs has 1" in found


def test_the_batch_is_read_from_the_engines(tmp_path: Path) -> None:
    plans = copy.deepcopy(head_plans())
    plans["dit_bf16.engine"]["io"] = dit_io(sa=5, lengths=(1, 20, 64), batch=2)
    folder = write_bundle(tmp_path / "b", {"dit_bf16.engine": plans["dit_bf16.engine"]}, metadata(batch_size=None))
    assert problems(folder, "dit_only") == ["export_metadata.json: batch_size missing"]
    folder = write_bundle(tmp_path / "b", {"dit_bf16.engine": plans["dit_bf16.engine"]}, metadata(batch_size=2))
    assert check_bundle(folder, "dit_only").batch_size == 2


def test_a_dynamic_batch_must_reach_it(tmp_path: Path) -> None:
    """N1.6's engines take a range of batches."""
    plans = spoilt("state_encoder.engine", "state", shape=[-1, 1, 64], profiles=[[[1, 1, 64], [2, 1, 64], [4, 1, 64]]])
    for io in plans["state_encoder.engine"]["io"][1:]:
        io["shape"] = [-1, *io["shape"][1:]]
        if io["mode"] == "input":
            io["profiles"] = [[[1], [2], [4]]]
    check_bundle(write_bundle(tmp_path / "b", plans), "action_head")
    only = {
        "state_encoder.engine": plans["state_encoder.engine"],
        **{k: v for k, v in head_plans().items() if "state" not in k},
    }
    found = problems(write_bundle(tmp_path / "eight", only, metadata(batch_size=8)))
    assert "state_encoder.engine: input state: dimension 0 takes 1 to 4, and batch_size is 8" in found


# Engines and policy ---------------------------------------------------------------------------------------------------


def test_an_engine_of_another_horizon(tmp_path: Path) -> None:
    plans = copy.deepcopy(head_plans())
    plans["dit_bf16.engine"] = head_plans(16)["dit_bf16.engine"]
    found = problems(write_bundle(tmp_path / "b", plans))
    assert "sa_seq_len: export_metadata.json has 5, and dit_bf16.engine: input sa_embs has 17" in found


def test_a_policy_of_another_horizon(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", head_plans(16), metadata(action_horizon=16, sa_seq_len=17))
    check_bundle(folder, "action_head")
    found = problems(folder, policy=groot_rig.policy())
    assert "action_horizon: export_metadata.json has 16, and the policy's configuration has 4" in found


def test_a_policy_whose_head_contradicts_its_configuration(tmp_path: Path) -> None:
    """The script's set-up asserts this after it has deleted the modules."""
    policy = groot_rig.policy()
    policy.model.action_head.action_dim = 32
    found = problems(write_bundle(tmp_path / "b"), policy=policy)
    assert "max_action_dim: export_metadata.json has 64, and the action head's action_dim has 32" in found
    assert isinstance(policy.model.action_head.model, groot_rig.Dit)


def test_engines_that_do_not_fit_each_other_without_metadata(tmp_path: Path) -> None:
    plans = {**head_plans(), "action_decoder.engine": head_plans(8)["action_decoder.engine"]}
    folder = write_bundle(tmp_path / "b", plans)
    (folder / "export_metadata.json").unlink()
    found = problems(folder)
    assert any(p.startswith("sa_seq_len: ") and "has 5" in p and "has 9" in p for p in found)


@pytest.mark.parametrize(
    ("name", "port", "fields", "expected"),
    [
        ("dit_bf16.engine", "timestep", {"dtype": "int32"}, "input timestep: found int32; allowed: int64"),
        ("dit_bf16.engine", "image_mask", {"dtype": "float32"}, "input image_mask: found float32; allowed: bool"),
        ("dit_bf16.engine", "output", {"dtype": "float32"}, "output output: found float32; allowed: bfloat16"),
        ("dit_bf16.engine", "timestep", {"name": "step"}, "input timestep is missing; it has sa_embs, vl_embs, step"),
        ("dit_bf16.engine", "timestep", {"name": "step"}, "input step is one that the scripts pass nothing for"),
        ("dit_bf16.engine", "output", {"name": "velocity"}, "output output is missing; it has velocity"),
        ("state_encoder.engine", "state", {"shape": [1, 2, 64]}, "found [1, 2, 64]; allowed: 1 in dimension 1"),
        ("action_encoder.engine", "actions", {"shape": [4, 64]}, "found [4, 64]; allowed: 3 dimensions"),
        (
            "dit_bf16.engine",
            "vl_embs",
            {"profiles": [[[1, 30, 64], [1, 40, 64], [1, 64, 64]]]},
            "input vl_embs: dimension 1 takes 30 to 64, and vl_seq_len is 20",
        ),
    ],
)
def test_inputs_and_outputs(tmp_path: Path, name: str, port: str, fields: dict[str, Any], expected: str) -> None:
    found = problems(write_bundle(tmp_path / "b", spoilt(name, port, **fields)))
    assert any(problem.startswith(name) and expected in problem for problem in found), found


def test_inputs_in_another_order(tmp_path: Path) -> None:
    """The scripts pass them by position."""
    plans = copy.deepcopy(head_plans())
    io = plans["action_decoder.engine"]["io"]
    io[0], io[1] = io[1], io[0]
    plans["action_decoder.engine"]["program"] = "add"
    (found,) = problems(write_bundle(tmp_path / "b", plans))
    assert found == (
        "action_decoder.engine: found the inputs in the order embodiment_id, model_output; the scripts pass "
        "model_output, embodiment_id"
    )


def test_a_static_sequence_length_must_be_the_one_of_the_export(tmp_path: Path) -> None:
    static = copy.deepcopy(head_plans())
    for io in static["dit_bf16.engine"]["io"]:
        io["shape"] = [24 if d == -1 else d for d in io["shape"]]
        io["profiles"] = []
    found = problems(write_bundle(tmp_path / "b", static))
    assert "vl_seq_len: export_metadata.json has 20, and dit_bf16.engine: input vl_embs has 24" in found


def test_a_plan_that_cannot_be_loaded_is_one_of_the_problems(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", meta=metadata(max_action_dim=32))
    (folder / "action_encoder.engine").write_bytes(b"\0" * 64)
    found = problems(folder)
    assert any(p.startswith("action_encoder.engine: ") and "all zeros" in p for p in found)
    assert any(p.startswith("max_action_dim: ") for p in found)
    assert rig.trt().live("ICudaEngine") == 0


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    plans = spoilt("dit_bf16.engine", "timestep", dtype="int32")
    policy = groot_rig.policy()
    folder = write_bundle(tmp_path / "b", plans, metadata(hidden_size=32, sa_seq_len=6))
    with pytest.raises(BundleError, match=r"found \d+ problems for mode 'action_head'") as info:
        check_bundle(folder, "action_head", policy)
    text = str(info.value)
    for part in ("hidden_size", "sa_seq_len", "timestep"):
        assert part in text
    assert "The policy is as it was." in text
    assert isinstance(info.value, ValueError)
    assert isinstance(info.value, JetrtError)
    again = pickle.loads(pickle.dumps(info.value))
    assert (type(again), again.problems, str(again)) == (type(info.value), info.value.problems, text)


def test_an_optimised_head_has_other_inputs(tmp_path: Path) -> None:
    """The Thor recipe moves the keys and values out of the DiT, and names it in the metadata."""
    inputs = [tensor("sa_embs", "input", "float16", [1, 5, 64]), tensor("cross_keys", "input", "float16", [1, 64])]
    dit = {"program": "copy", "io": [*inputs, tensor("output", "output", "float16", [1, 5, 64])]}
    folder = write_bundle(tmp_path / "b", {"dit_bf16.engine": dit}, metadata(optimized_action_head=True))
    check_bundle(folder, "dit_only")


# Memory ---------------------------------------------------------------------------------------------------------------


def test_engines_are_kept_for_the_set_up_if_they_fit(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    check_bundle(folder, "action_head", keep_engines=True)
    assert rig.trt().live("ICudaEngine") == 4
    count = len(load_report())
    for name in head_plans():
        assert preloading.take(folder / name, 0, "engine") is not None
    assert len(load_report()) == count


def test_engines_are_loaded_one_at_a_time_if_they_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bundle(tmp_path / "b")
    monkeypatch.setattr("jetrt.groot.bundle.available", lambda device: 100)
    most = []
    original = preloading.load_core

    def load(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        most.append(rig.trt().live("ICudaEngine"))
        return found

    monkeypatch.setattr("jetrt.groot.bundle.load_core", load)
    check_bundle(folder, "action_head", keep_engines=True)
    assert most == [1, 1, 1, 1]
    assert rig.trt().live("ICudaEngine") == 0


def test_what_was_preloaded_is_looked_at_and_stays(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    preload(folder)
    count = len(load_report())
    check_bundle(folder, "action_head", groot_rig.policy(), keep_engines=True)
    assert len(load_report()) == count
    assert rig.trt().live("ICudaEngine") == 4


def test_the_sizes_of_the_rig_are_those_of_the_policy() -> None:
    assert json.loads(json.dumps(metadata()))["sa_seq_len"] == CONFIG.action_horizon + 1
