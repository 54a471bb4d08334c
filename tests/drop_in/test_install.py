"""`install()` and `undo()`: whose names are swapped, when, and back; the checked set-up and what it puts right."""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import logging
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import groot_rig
import pytest
import rig
import standin
import torch
from groot_rig import backbone_plans, dit_inputs, dit_io, head_inputs, head_plans, metadata, write_bundle

import jetrt.trt_torch
from jetrt.errors import InputError, ShapeError
from jetrt.groot import (
    BundleError,
    engine,
    install,
    installing,
    load_report,
    preload,
    preloading,
    replace,
    undo,
    wrappers,
)

pytestmark = pytest.mark.usefixtures("clean")

#: A script with the seams, as far as `install` looks.
SCRIPT = """
class TensorRTDiTWrapper:
    def __init__(self, engine_path, device=0):
        import tensorrt

def replace_dit_with_tensorrt(policy, trt_engine_path, device=0):
    policy.made_by = TensorRTDiTWrapper(trt_engine_path, device=device)
"""

#: The forward of the action head and the set-up, as the scripts have them where `install` and `repair` look.
FORWARD = '''
import logging
import os
from functools import partial

import torch
from standin import BatchFeature
from trt_torch import Engine

logger = logging.getLogger(__name__)


def head_forward(self, backbone_output, action_input{options}):
    """The loop over the engines, without real-time chunking."""
    dit = self.dit_engine
    embodiment_id = action_input.embodiment_id
    self.state_encoder_engine.set_runtime_tensor_shape("state", action_input.state.shape)
    state = self.state_encoder_engine(action_input.state, embodiment_id)["output"]
    actions = torch.zeros(1, self.config.action_horizon, self.action_dim, dtype=torch.bfloat16, device="cuda")
    for step in range(self.num_inference_timesteps):
        times = torch.full((1,), step, device="cuda", dtype=torch.int64)
        features = self.action_encoder_engine(actions, times, embodiment_id)["output"]
        sa_embs = torch.cat((state, features), dim=1)
        dit.set_runtime_tensor_shape("vl_embs", backbone_output.backbone_features.shape)
        dit.set_runtime_tensor_shape("image_mask", backbone_output.image_mask.shape)
        dit.set_runtime_tensor_shape("backbone_attention_mask", backbone_output.backbone_attention_mask.shape)
        moved = dit(
            sa_embs,
            backbone_output.backbone_features,
            times,
            image_mask=backbone_output.image_mask,
            backbone_attention_mask=backbone_output.backbone_attention_mask,
        )["output"]
        actions = actions + 0.25 * self.action_decoder_engine(moved, embodiment_id)["output"][:, -self.action_horizon :]
    return BatchFeature(data={{"action_pred": actions}})


def backbone_forward(self, vl_input):
    """Patches in the places of the image tokens, as N1.6 warns of a wrong number of them and N1.7 runs the engines."""
    ids, pixels, attended = vl_input["input_ids"], vl_input["pixel_values"], vl_input["attention_mask"]
    self.vit_engine.set_runtime_tensor_shape("pixel_values", pixels.shape)
    patches = self.vit_engine(pixels)["image_embeds"].to(torch.bfloat16)
    embeds, places = self._embedding_layer(ids), int((ids == self._image_token_id).sum().item())
    if places != patches.shape[0]:
        there = f"{{places}} image_token slots vs {{patches.shape[0]}} ViT output tokens"
        logger.warning(f"Vision token count mismatch: {{there}}. Truncating to min.")
    embeds = torch.cat((patches.unsqueeze(0), embeds[:, places:]), dim=1)
    self.llm_engine.set_runtime_tensor_shape("inputs_embeds", embeds.shape)
    self.llm_engine.set_runtime_tensor_shape("attention_mask", attended.shape)
    position_ids = torch.zeros(3, *ids.shape, dtype=torch.int64, device=ids.device)
    self.llm_engine.set_runtime_tensor_shape("position_ids", position_ids.shape)
    features = self.llm_engine(embeds, attended, position_ids)["embeddings"]
    masks = {{"backbone_attention_mask": attended == 1, "image_mask": ids == self._image_token_id}}
    return BatchFeature(data={{"backbone_features": features, **masks}})


def setup_tensorrt_engines(policy, trt_engine_path, mode="n17_full_pipeline"):
    """Set up."""
    calls.append(mode)
    backbone, head = policy.model.backbone, policy.model.action_head
    if mode not in ("dit_only", "action_head", "vit_llm_only", "n17_full_pipeline", "full_pipeline"):
        raise ValueError(f"Unknown mode: {{mode}}. Expected others.")
    if mode == "vit_llm_only":
        backbone._image_token_id = backbone.model.config.image_token_index
        backbone._embedding_layer = torch.nn.Embedding(64, 64, device="cuda", dtype=torch.bfloat16)
        del backbone.model
        backbone.vit_engine = Engine(os.path.join(trt_engine_path, "vit.engine"))
        backbone.llm_engine = Engine(os.path.join(trt_engine_path, "llm_bf16.engine"))
        backbone.forward = partial(backbone_forward, backbone)
        return
    del head.model
    if mode == "dit_only":
        head.dit_engine = Engine(os.path.join(trt_engine_path, "dit_bf16.engine"))

        def get_action_with_features(backbone_features, state_features, embodiment_id, backbone_output):
            raise AssertionError("the defect")

        head.get_action_with_features = get_action_with_features
        return
    del head.state_encoder, head.action_encoder, head.action_decoder
    if broken:
        Engine(os.path.join(trt_engine_path, "state_encoder.engine"))
        raise RuntimeError("the second engine could not be loaded")
    if os.path.exists(os.path.join(trt_engine_path, "vit_bf16.engine")):
        backbone.vit_engine = Engine(os.path.join(trt_engine_path, "vit_bf16.engine"))
    for name in ("state_encoder", "action_encoder", "action_decoder"):
        setattr(head, name + "_engine", Engine(os.path.join(trt_engine_path, name + ".engine")))
    head.dit_engine = Engine(os.path.join(trt_engine_path, "dit_bf16.engine"))
    head.get_action = partial(head_forward, head)


def close_tensorrt_engines(policy):
    for part in (policy.model.backbone, policy.model.action_head):
        for value in vars(part).values():
            if isinstance(value, Engine):
                value.close()


calls, broken = [], False
'''


@pytest.fixture(autouse=True)
def as_before(clean: None) -> Iterator[None]:
    modules = set(sys.modules)
    yield
    undo()
    preloading.drop_all()
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the scripts on sys.path, whose `trt_torch` must not be imported."""
    (tmp_path / "scripts").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "scripts"))
    (tmp_path / "scripts" / "trt_torch.py").write_text("raise ImportError('No module named tensorrt')\n")
    (tmp_path / "scripts" / "trt_model_forward.py").write_text(FORWARD.format(options=", options=None"))
    (tmp_path / "scripts" / "standalone_inference_script.py").write_text(SCRIPT)
    return tmp_path / "scripts"


@pytest.fixture
def forward(folder: Path) -> Any:
    """`trt_model_forward` over our engine, imported after install()."""
    install(types.ModuleType("script"))
    import trt_model_forward

    return trt_model_forward


def script(text: str = SCRIPT, name: str = "script") -> Any:
    module = types.ModuleType(name)
    exec(text, vars(module))
    return module


# Seam A ---------------------------------------------------------------------------------------------------------------


def test_names_of_the_script_are_swapped_and_put_back() -> None:
    module = script()
    own = dict(vars(module))
    done = install(module)
    assert module.TensorRTDiTWrapper is wrappers.TensorRTDiTWrapper
    assert inspect.signature(module.replace_dit_with_tensorrt) == inspect.signature(replace.replace_dit_with_tensorrt)
    assert not hasattr(module, "TensorRTBackboneWrapper")  # it had none
    assert done == ["sys.modules.trt_torch", "script.TensorRTDiTWrapper", "script.replace_dit_with_tensorrt"]
    undo()
    assert vars(module) == own
    assert "trt_torch" not in sys.modules
    undo()


def test_the_names_of_the_forks_too() -> None:
    module = script(SCRIPT + "\nclass TensorRTBackboneWrapper: pass\ndef replace_backbone_with_tensorrt(p): pass\n")
    assert len(install(module)) == 5
    assert module.TensorRTBackboneWrapper is wrappers.TensorRTBackboneWrapper


def test_without_a_module_it_is_main(monkeypatch: pytest.MonkeyPatch) -> None:
    main = script(name="__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    install()
    assert main.TensorRTDiTWrapper is wrappers.TensorRTDiTWrapper


def test_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_script", script(name="some_script"))
    assert "some_script.TensorRTDiTWrapper" in install("some_script")
    with pytest.raises(KeyError):
        install("nobody")


def test_twice_is_once() -> None:
    module = script()
    own = dict(vars(module))
    assert len(install(module)) == 3
    assert install(module) == []
    undo()
    assert vars(module) == own


def test_a_second_script_is_added() -> None:
    first, second = script(name="first"), script(name="second")
    install(first)
    assert install(second) == ["second.TensorRTDiTWrapper", "second.replace_dit_with_tensorrt"]
    undo()
    assert first.TensorRTDiTWrapper is not wrappers.TensorRTDiTWrapper
    assert second.TensorRTDiTWrapper is not wrappers.TensorRTDiTWrapper


def test_what_was_bound_anew_is_left_alone() -> None:
    module = script()
    install(module)
    module.TensorRTDiTWrapper = own = type("Own", (), {})
    undo()
    assert module.TensorRTDiTWrapper is own


def test_an_import_above_the_classes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later `class` statement binds the name again: nothing that is called before it can help."""
    main = types.ModuleType("__main__")
    main.__file__ = str(tmp_path / "script.py")
    Path(main.__file__).write_text("import jetrt.groot\njetrt.groot.install()\n" + SCRIPT)
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.warns(RuntimeWarning, match=r"binds TensorRTDiTWrapper, replace_dit_with_tensorrt after this call"):
        install()
    exec(SCRIPT, vars(main))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install()  # one line below the classes
    assert main.TensorRTDiTWrapper is wrappers.TensorRTDiTWrapper


def test_the_script_as_a_module_that_others_import_later(folder: Path) -> None:
    """The benchmark imports the function from the script, inside a function of its own."""
    install(types.ModuleType("benchmark"))
    from standalone_inference_script import replace_dit_with_tensorrt

    module = sys.modules["standalone_inference_script"]
    assert module.TensorRTDiTWrapper is wrappers.TensorRTDiTWrapper
    assert replace_dit_with_tensorrt is module.replace_dit_with_tensorrt
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert inspect.getsource(module).lstrip().startswith("class TensorRTDiTWrapper")
    undo()
    assert module.TensorRTDiTWrapper is not wrappers.TensorRTDiTWrapper
    reloaded = importlib.reload(module)
    assert reloaded.TensorRTDiTWrapper is not wrappers.TensorRTDiTWrapper


def test_free_torch_of_install(plan: groot_rig.Write) -> None:
    path = plan("dit5", io=dit_io(sa=5, lengths=(1, 20, 64)))
    module = script()
    for free in (False, True):
        install(module, free_torch=free)
        policy = groot_rig.policy()
        module.replace_dit_with_tensorrt(policy, path)
        assert len(list(policy.model.action_head.model.children())) == (0 if free else 1)
    policy = groot_rig.policy()
    module.replace_dit_with_tensorrt(policy, path, free_torch=False)
    assert len(list(policy.model.action_head.model.children())) == 1


# Seam B ---------------------------------------------------------------------------------------------------------------


def test_trt_torch_is_ours_before_anybody_imports_it(folder: Path) -> None:
    """The module puts its own folder first on sys.path: a file on PYTHONPATH would lose."""
    install(types.ModuleType("script"))
    import trt_model_forward
    import trt_torch

    assert trt_torch.Engine is trt_model_forward.Engine is engine.Engine
    assert trt_torch.torch_type is jetrt.trt_torch.torch_type
    assert issubclass(trt_torch.GraphSafeEngine, jetrt.trt_torch.Engine)
    assert "tensorrt" not in sys.modules
    undo()
    assert "trt_torch" not in sys.modules


def test_modules_that_are_imported_already(folder: Path) -> None:
    theirs = types.ModuleType("trt_torch")
    theirs.Engine, theirs.torch_type, theirs.more = object, object, "kept"
    sys.modules["trt_torch"] = theirs
    import trt_model_forward

    original = trt_model_forward.setup_tensorrt_engines
    assert trt_model_forward.Engine is object
    install(types.ModuleType("script"))
    assert theirs.Engine is trt_model_forward.Engine is engine.Engine
    assert sys.modules["trt_torch"].more == "kept"
    assert trt_model_forward.setup_tensorrt_engines.jetrt_original is original
    assert trt_model_forward.setup_tensorrt_engines.__doc__ == "Set up."
    undo()
    assert trt_model_forward.Engine is theirs.Engine is object
    assert trt_model_forward.setup_tensorrt_engines is original
    assert type(trt_model_forward.logger) is logging.Logger


def test_an_engine_that_the_script_imported_before() -> None:
    module = types.ModuleType("script")
    module.Engine = type("Engine", (), {"__module__": "trt_torch"})
    other = types.ModuleType("other")
    other.Engine = type("Engine", (), {"__module__": "car_factory"})
    install(module)
    install(other)
    assert module.Engine is engine.Engine
    assert other.Engine is not engine.Engine


def test_a_set_up_that_the_script_imported_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.modules["trt_torch"] = theirs = types.ModuleType("trt_torch")
    theirs.Engine = object
    import trt_model_forward

    module = types.ModuleType("script")
    module.setup_tensorrt_engines = trt_model_forward.setup_tensorrt_engines
    install(module)
    assert hasattr(module.setup_tensorrt_engines, "jetrt_original")


# Seam C: checked whole, then theirs -----------------------------------------------------------------------------------


def test_the_scripts_own_set_up_runs_over_our_engine(forward: Any, tmp_path: Path) -> None:
    policy = groot_rig.policy()
    bundle = write_bundle(tmp_path / "b")
    count = len(load_report())
    forward.setup_tensorrt_engines(policy, str(bundle), mode="action_head")
    assert forward.calls == ["action_head"]
    head = policy.model.action_head
    names = ("state_encoder", "action_encoder", "dit", "action_decoder")
    engines = [getattr(head, f"{name}_engine") for name in names]
    assert all(type(one) is engine.Engine for one in engines)
    # Loaded once: those of the check were taken.
    assert len(load_report()) == count + 4
    output, given = head_inputs()
    found = head.get_action(output, given)["action_pred"]
    assert found.shape == (1, 4, 64)
    again = head.get_action(output, given, options=None)["action_pred"]
    assert torch.equal(found, again)
    assert isinstance(head.get_action, functools.partial)
    assert head.get_action.func.__name__ == "head_forward"
    forward.close_tensorrt_engines(policy)
    forward.close_tensorrt_engines(policy)
    assert rig.trt().live("ICudaEngine") == 0


def test_the_default_mode_is_the_scripts(forward: Any, tmp_path: Path) -> None:
    policy = groot_rig.policy()
    forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b")))
    assert forward.calls == ["n17_full_pipeline"]
    forward.close_tensorrt_engines(policy)


def test_the_mode_may_be_the_scripts_enum(forward: Any, tmp_path: Path) -> None:
    """Newer versions have `InferenceMode`, of strings."""
    mode = enum.Enum("InferenceMode", {"action_head": "action_head"}, type=str)
    policy = groot_rig.policy()
    forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b")), mode=mode.action_head)
    assert forward.calls == [mode.action_head]
    assert policy.model.action_head.dit_engine.core.stats["calls"] == 0
    forward.close_tensorrt_engines(policy)
    missing = write_bundle(tmp_path / "c", {})
    with pytest.raises(FileNotFoundError, match=r"action_decoder\.engine"):
        forward.setup_tensorrt_engines(groot_rig.policy(), str(missing), mode=mode.action_head)


def backbone_features() -> standin.BatchFeature:
    ids = torch.arange(20, device="cuda").reshape(1, 20) + 8
    ids[:, :16] = 7  # the image's tokens
    pixels = torch.randn(16, 64, device="cuda").to(torch.bfloat16).float()
    return standin.BatchFeature(data={"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})


def test_a_backbone_of_engines_with_the_hooks_of_the_verification(forward: Any, tmp_path: Path) -> None:
    """It hooks the backbone before the set-up and after it, clones what it sees, and asks the vision engine's type."""
    policy, seen = groot_rig.policy(), []
    backbone, head = policy.model.backbone, dict(vars(policy.model.action_head))

    def hook(module: Any, args: Any, output: Any) -> Any:
        seen.append(output["backbone_features"].detach().clone())
        return output

    backbone.register_forward_hook(hook)
    given = backbone_features()
    backbone(given)
    forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b", backbone_plans())), mode="vit_llm_only")
    backbone.register_forward_hook(hook)
    assert policy.model.backbone is backbone
    assert isinstance(backbone.forward, functools.partial)
    assert (backbone.vit_engine.dtype_of("pixel_values"), backbone._image_token_id) == (torch.float32, 7)
    with torch.inference_mode():
        found = policy.model.backbone(given)
    expected = torch.cat(
        (given["pixel_values"].to(torch.bfloat16).unsqueeze(0), backbone._embedding_layer(given["input_ids"])[:, 16:]),
        dim=1,
    )
    assert torch.equal(found["backbone_features"], expected)
    assert len(seen) == 3
    assert torch.equal(seen[1], expected)
    assert torch.equal(seen[2], expected)
    assert dict(vars(policy.model.action_head)) == head  # stays in torch
    assert rig.trt().live("ICudaEngine") == 2
    forward.close_tensorrt_engines(policy)
    assert rig.trt().live("ICudaEngine") == 0


@pytest.mark.parametrize("name", ["vit.engine", "llm_bf16.engine"])
def test_a_backbone_without_one_of_its_engines_is_a_missing_file(forward: Any, tmp_path: Path, name: str) -> None:
    plans = {file: plan for file, plan in backbone_plans().items() if file != name}
    policy = groot_rig.policy()
    with pytest.raises(FileNotFoundError, match=name):
        forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b", plans)), mode="vit_llm_only")
    assert forward.calls == []
    assert hasattr(policy.model.backbone, "model")


def test_a_bad_bundle_is_told_before_anything_is_deleted(forward: Any, tmp_path: Path) -> None:
    policy = groot_rig.policy()
    for bundle, wrong in (
        (write_bundle(tmp_path / "a", meta=metadata(action_horizon=16, sa_seq_len=17)), "action_horizon"),
        (write_bundle(tmp_path / "b", {k: v for k, v in head_plans().items() if "decoder" not in k}), "action_decoder"),
    ):
        with pytest.raises(BundleError, match=wrong):
            forward.setup_tensorrt_engines(policy, str(bundle), mode="action_head")
    assert forward.calls == []
    assert isinstance(policy.model.action_head.model, groot_rig.Dit)
    assert isinstance(policy.model.action_head.action_decoder, groot_rig.Encoder)
    assert rig.trt().live("ICudaEngine") == 0


def test_an_unknown_mode_is_the_scripts_to_refuse(
    forward: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, "jetrt.groot"),
        pytest.raises(ValueError, match=r"^Unknown mode: other\. Expected others\."),
    ):
        forward.setup_tensorrt_engines(groot_rig.policy(), str(write_bundle(tmp_path / "b")), mode="other")
    assert "the files of mode 'other' are not known and not checked" in caplog.text


def test_a_set_up_that_fails_half_way_frees_its_engines(forward: Any, tmp_path: Path) -> None:
    forward.broken = True
    bundle = write_bundle(tmp_path / "b")
    with pytest.raises(RuntimeError, match="the second engine"):
        forward.setup_tensorrt_engines(groot_rig.policy(), str(bundle), mode="action_head")
    preloading.drop_all()  # those that were kept for it
    assert rig.trt().live("ICudaEngine") == 0


def test_a_plan_that_the_script_does_not_look_for_is_told(forward: Any, tmp_path: Path) -> None:
    """A newer export's vit.engine beside an older script: torch would compute that part without a word."""
    plans = {**head_plans(), "vit.engine": backbone_plans()["vit.engine"]}
    bundle = write_bundle(tmp_path / "b", plans)
    policy = groot_rig.policy()
    with pytest.warns(RuntimeWarning, match=r"vit\.engine is there, and the script did not load it"):
        forward.setup_tensorrt_engines(policy, str(bundle))
    assert rig.trt().live("ICudaEngine") == 4
    forward.close_tensorrt_engines(policy)


def test_a_preloaded_bundle_is_not_loaded_again(forward: Any, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b")
    preload(bundle)
    count = len(load_report())
    policy = groot_rig.policy()
    forward.setup_tensorrt_engines(policy, bundle, mode="action_head")
    assert len(load_report()) == count
    forward.close_tensorrt_engines(policy)


def test_the_set_up_of_n1_5_by_its_precisions(folder: Path, tmp_path: Path) -> None:
    (folder / "trt_model_forward.py").write_text(
        textwrap.dedent("""
        from trt_torch import Engine
        calls = []

        def setup_tensorrt_engines(policy, trt_engine_path, vit_dtype="fp8", llm_dtype="nvfp4", dit_dtype="fp8"):
            calls.append((vit_dtype, llm_dtype, dit_dtype))
        """)
    )
    install(types.ModuleType("script"))
    import trt_model_forward

    with pytest.raises(FileNotFoundError, match=r"vit_fp16\.engine is missing\n.*llm_fp16\.engine"):
        trt_model_forward.setup_tensorrt_engines(groot_rig.policy(), str(tmp_path), "fp16", "fp16", "fp16")
    assert trt_model_forward.calls == []


# Upstream's defects ---------------------------------------------------------------------------------------------------


def test_dit_only_takes_what_its_caller_passes(forward: Any, tmp_path: Path) -> None:
    """The function that N1.7's set-up installs takes four arguments, and is called with six."""
    policy = groot_rig.policy()
    head = policy.model.action_head
    forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b")), mode="dit_only")
    assert "get_action_with_features" not in vars(head)
    assert head.dit_engine.dtype_of("timestep") is torch.int64
    output, given = head_inputs()
    torch.manual_seed(5)
    found = head.get_action(output, given, options={"anything": 1})["action_pred"]
    # The same DiT in the head's own loop, put there by hand.
    other = groot_rig.policy()
    replace.replace_dit_with_tensorrt(other, tmp_path / "b" / "dit_bf16.engine")
    output, given = head_inputs()
    torch.manual_seed(5)
    assert torch.equal(found, other.model.action_head.get_action(output, given)["action_pred"])
    with pytest.raises(RuntimeError, match=r"^TensorRT only returns the final output"):
        head.model(*list(dit_inputs(s=20, sa=5))[:3], return_all_hidden_states=True)
    forward.close_tensorrt_engines(policy)


def test_dit_only_serves_real_time_chunking(forward: Any, tmp_path: Path) -> None:
    policy = groot_rig.policy()
    forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b")), mode="dit_only")
    options = {"action_horizon": 4, "rtc_overlap_steps": 2, "rtc_frozen_steps": 2, "rtc_ramp_rate": 1.0}
    previous = torch.full((1, 4, 64), 3.0, device="cuda", dtype=torch.bfloat16)
    output, given = head_inputs()
    given["action"] = previous
    found = policy.model.action_head.get_action(output, given, options)["action_pred"]
    assert torch.equal(found[:, :2], previous[:, 2:])
    forward.close_tensorrt_engines(policy)


def test_dit_only_of_n1_6_is_left_as_it_is(forward: Any, tmp_path: Path) -> None:
    """There the caller passes four."""
    policy = groot_rig.policy(head=standin.ActionHeadN16)
    forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b")), mode="dit_only")
    assert "get_action_with_features" in vars(policy.model.action_head)
    forward.close_tensorrt_engines(policy)


@pytest.mark.parametrize("options", [", options=None", ""])
def test_real_time_chunking_is_refused_by_the_engines_loop(folder: Path, tmp_path: Path, options: str) -> None:
    """Upstream's loop starts from noise and says nothing of the previous actions."""
    (folder / "trt_model_forward.py").write_text(FORWARD.format(options=options))
    install(types.ModuleType("script"))
    import trt_model_forward

    policy = groot_rig.policy()
    trt_model_forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b")), mode="action_head")
    head = policy.model.action_head
    output, given = head_inputs()
    head.get_action(output, given)
    head.get_action(output, given, None)
    head.get_action(output, given, options={"rtc_ramp_rate": 1.0})
    given["action"] = torch.zeros(1, 4, 64, device="cuda")
    with pytest.raises(InputError, match=r"real-time chunking: found the previous actions.*mode 'dit_only'"):
        head.get_action(output, given, {"rtc_ramp_rate": 1.0})
    trt_model_forward.close_tensorrt_engines(policy)


def test_a_wrong_number_of_image_tokens_stops_the_backbone(forward: Any, tmp_path: Path) -> None:
    """N1.6's warns, and assigns into a copy: the image tokens stay zero."""
    policy = groot_rig.policy()
    forward.setup_tensorrt_engines(policy, str(write_bundle(tmp_path / "b", backbone_plans())), mode="vit_llm_only")
    given = backbone_features()
    policy.model.backbone(given)
    given["input_ids"][:, 15] = 8
    with pytest.raises(
        ShapeError, match=r"^input 'pixel_values': found .*15 image_token slots vs 16 ViT output tokens"
    ):
        policy.model.backbone(given)
    assert policy.model.backbone.llm_engine.core.stats["calls"] == 1
    forward.close_tensorrt_engines(policy)


def test_other_lines_of_that_logger_stay_lines(forward: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = "Vision token count mismatch: 80 image_token slots vs 81 ViT output tokens. Truncating to min."
    with pytest.raises(ShapeError, match=r"80 image_token slots vs 81 ViT output tokens"):
        forward.logger.warning(text)
    logging.disable(logging.CRITICAL)  # heard or not
    try:
        with pytest.raises(ShapeError, match="80 image_token slots"):
            forward.logger.warning("Vision token count mismatch: %d image_token slots", 80)
    finally:
        logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        forward.logger.warning("Unexpected state shape: %s", "[1]")
        forward.logger.info("loaded")
    assert [record.message for record in caplog.records] == ["Unexpected state shape: [1]", "loaded"]
    assert caplog.records[0].funcName == "test_other_lines_of_that_logger_stay_lines"


# optimize -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def optimized(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(installing, "handles", [])
    yield
    for _, handle in installing.handles:
        handle.undo()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("seam", ["A", "C"])
def test_optimize_for_each_policy(tmp_path: Path, seam: str) -> None:
    """The loop as one graph, after the first calls have captured it; the same actions as before. The set-up is the one
    of the benches, whose loop is upstream's."""
    bundle = write_bundle(tmp_path / "b")
    module = script()

    def actions(policy: Any, count: int) -> list[torch.Tensor]:
        torch.manual_seed(9)
        with torch.inference_mode():
            return [policy.model.action_head.get_action(*head_inputs(seed=i))["action_pred"] for i in range(count)]

    def made() -> Any:
        policy = groot_rig.policy()
        if seam == "A":
            module.replace_dit_with_tensorrt(policy, bundle / "dit_bf16.engine")
        else:
            import trt_model_forward

            trt_model_forward.setup_tensorrt_engines(policy, str(bundle), mode="action_head")
        return policy

    install(module)
    plain = made()
    expected = actions(plain, 4)
    install(module, optimize=True)
    policy = made()
    for found, wanted in zip(actions(policy, 4), expected, strict=True):
        assert torch.equal(found, wanted)
    (stats,) = installing.statistics()
    assert stats["replays"] >= 3, stats
    # Replaced once more: over the new engine.
    module.replace_dit_with_tensorrt(made() if seam == "C" else policy, bundle / "dit_bf16.engine")
    assert len(installing.statistics()) == (2 if seam == "C" else 1)


@pytest.mark.usefixtures("optimized")
def test_optimize_of_a_head_that_it_does_not_know(plan: groot_rig.Write) -> None:
    module = script()
    install(module, optimize=True)
    policy = types.SimpleNamespace(model=types.SimpleNamespace(action_head=types.SimpleNamespace(model=None)))
    with pytest.warns(RuntimeWarning, match="the denoising loop stays as it is: SimpleNamespace is no action head"):
        module.replace_dit_with_tensorrt(policy, plan("dit5"))
    assert installing.statistics() == []
