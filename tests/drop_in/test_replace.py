"""`replace_dit_with_tensorrt` and `replace_backbone_with_tensorrt`: what they install, keep, free and refuse."""

from __future__ import annotations

import gc
import inspect
import socket
import socketserver
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import groot_rig
import pytest
import standin
import torch
from groot_rig import dit_inputs, dit_io, head_inputs, same
from test_wrappers import backbone_inputs, one_output, three_outputs
from torch import nn

from fakes import tensor
from jetrt.errors import DTypeError, InputNameError
from jetrt.groot import (
    TensorRTBackboneWrapper,
    TensorRTDiTWrapper,
    preload,
    replace_backbone_with_tensorrt,
    replace_dit_with_tensorrt,
)

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def dit(plan: groot_rig.Write) -> Any:
    """A plan that fits the policy of `groot_rig`."""
    return plan("dit5", name="dit_bf16.engine", io=dit_io(sa=5, lengths=(1, 20, 64)))


def call(policy: Any, seed: int = 0, **more: Any) -> tuple[torch.Tensor, Any]:
    """What the installed DiT gives, called as the heads call it, and what it should give."""
    given = dit_inputs(seed, s=20, sa=5)
    found = policy.model.action_head.model(
        hidden_states=given.sa_embs,
        encoder_hidden_states=given.vl_embs,
        timestep=given.timestep,
        image_mask=given.image_mask,
        backbone_attention_mask=given.backbone_attention_mask,
        **more,
    )
    return found, given.expected()


# The DiT --------------------------------------------------------------------------------------------------------------


def test_signatures_are_the_scripts() -> None:
    made = inspect.signature(replace_dit_with_tensorrt).parameters
    assert list(made)[:4] == ["policy", "trt_engine_path", "device", "preloaded_trt"]
    assert (made["device"].default, made["preloaded_trt"].default) == (0, None)
    made = inspect.signature(replace_backbone_with_tensorrt).parameters
    assert list(made)[:4] == ["policy", "trt_engine_path", "device", "preloaded_trt"]
    assert (made["device"].default, made["preloaded_trt"].default) == (0, None)


def test_the_forward_is_replaced_and_the_module_stays(dit: Any) -> None:
    policy = groot_rig.policy()
    module = policy.model.action_head.model
    weights = {name: p.data_ptr() for name, p in module.named_parameters()}
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert replace_dit_with_tensorrt(policy, str(dit)) is None
    assert policy.model.action_head.model is module
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == weights
    found, expected = call(policy)
    assert same(found, expected)
    assert seen == [found.shape]


def test_the_signature_of_the_forward(dit: Any) -> None:
    policy = groot_rig.policy()
    replace_dit_with_tensorrt(policy, dit)
    forward = policy.model.action_head.model.forward
    parameters = inspect.signature(forward).parameters
    assert list(parameters) == [
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
        "return_all_hidden_states",
        "image_mask",
        "backbone_attention_mask",
    ]
    assert parameters["encoder_attention_mask"].default is None
    assert parameters["return_all_hidden_states"].default is False
    found, expected = call(policy, encoder_attention_mask=torch.zeros(1, 20, device="cuda"))
    assert same(found, expected)  # the mask is not used, as upstream
    given = dit_inputs(s=20, sa=5)
    positional = forward(*list(given)[:3], None, False, *list(given)[3:])
    assert same(positional, expected)


def test_hidden_states_are_refused_before_the_engine_runs(dit: Any) -> None:
    """Upstream raises the same after the engine has run."""
    policy = groot_rig.policy()
    wrapper = TensorRTDiTWrapper(dit)
    replace_dit_with_tensorrt(policy, dit, preloaded_trt=wrapper)
    with pytest.raises(RuntimeError, match=r"^TensorRT only returns the final output"):
        call(policy, return_all_hidden_states=True)
    assert wrapper.core.stats["calls"] == 0
    call(policy, return_all_hidden_states=False)
    assert wrapper.core.stats["calls"] == 1


@pytest.mark.parametrize("floats", ["float32", "float16"])
def test_the_result_has_the_type_of_the_hidden_states(plan: groot_rig.Write, floats: str) -> None:
    policy = groot_rig.policy()
    path = plan("dit5", io=dit_io(floats=floats, sa=5, lengths=(1, 20, 64)))
    replace_dit_with_tensorrt(policy, path)
    found, _ = call(policy)
    assert found.dtype is torch.bfloat16
    expected = groot_rig.rounded(dit_inputs(s=20, sa=5).expected(floats), "bfloat16")
    assert same(found, expected)


def test_a_preloaded_wrapper_is_used_and_the_path_is_not(dit: Any) -> None:
    policy = groot_rig.policy()
    wrapper = TensorRTDiTWrapper(dit, ring=2)
    replace_dit_with_tensorrt(policy, "/nowhere", 0, wrapper)
    call(policy)
    assert wrapper.output_generation == 1


def test_after_a_failure_nothing_has_changed(plan: groot_rig.Write) -> None:
    policy = groot_rig.policy()
    module = policy.model.action_head.model
    count = len(list(module.parameters()))
    for path, error in (("/nowhere/dit.engine", FileNotFoundError), (plan("mlp"), InputNameError)):
        with pytest.raises(error):
            replace_dit_with_tensorrt(policy, path, free_torch=True)
        assert "forward" not in vars(module)
        assert len(list(module.parameters())) == count
    assert replaced(policy) is module


def replaced(policy: Any) -> Any:
    return policy.model.action_head.model


def test_free_torch_frees_and_keeps_what_the_policy_asks(dit: Any) -> None:
    policy = groot_rig.policy()
    head, module = policy.model.action_head, policy.model.action_head.model
    module.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    seen: list[Any] = []
    device, dtype = policy.model.device, policy.model.dtype
    of_head = (head.device, head.dtype)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    weights += sum(b.numel() * b.element_size() for b in module.buffers())
    gc.collect()
    before = torch.cuda.memory_allocated()
    replace_dit_with_tensorrt(policy, dit, free_torch=True)
    assert before - torch.cuda.memory_allocated() >= weights > 16_000
    assert [tuple(p.shape) for p in module.parameters()] == [(0,)]
    assert list(module.buffers()) == list(module.children()) == []
    assert (policy.model.device, policy.model.dtype) == (device, dtype)
    assert next(policy.model.parameters()).device.type == "cuda"
    assert (head.device, head.dtype) == of_head
    assert replaced(policy) is module
    found, expected = call(policy)
    assert same(found, expected)
    assert seen == [groot_rig.Dit]


def test_free_torch_frees_a_layer_with_two_names(dit: Any) -> None:
    policy = groot_rig.policy()
    module = policy.model.action_head.model
    module.again = module.blocks
    module.tied = module.scale
    replace_dit_with_tensorrt(policy, dit, free_torch=True)
    assert [tuple(p.shape) for p in module.parameters()] == [(0,)]
    assert list(module.children()) == []


def test_a_policy_without_its_dit(dit: Any) -> None:
    """One fork makes the policy with skip_dit, loads the engine first, and puts it in the gap."""
    for gap in ("none", "absent", "object"):
        policy = groot_rig.policy()
        head = policy.model.action_head
        if gap == "absent":
            del head.model
        else:
            head.model = None
        if gap == "object":
            del head.model
            object.__setattr__(head, "model", SimpleNamespace(forward=None))
        replace_dit_with_tensorrt(policy, dit, preloaded_trt=TensorRTDiTWrapper(dit))
        assert isinstance(head.model, nn.Module)
        found, expected = call(policy)
        assert same(found, expected)
        assert same(
            head.model.forward(*list(dit_inputs(s=20, sa=5))[:3], None, False, *list(dit_inputs(s=20, sa=5))[3:]),
            expected,
        )


def test_the_engine_is_found_by_its_path(dit: Any) -> None:
    preload([dit])
    policy = groot_rig.policy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_dit_with_tensorrt(policy, str(dit))
    from jetrt.groot import load_report

    assert sum(row["path"].endswith("dit_bf16.engine") for row in load_report()[-1:]) == 1
    count = len(load_report())
    found, expected = call(policy)
    assert same(found, expected)
    assert len(load_report()) == count


def test_a_folder_is_a_path_here(dit: Any) -> None:
    policy = groot_rig.policy()
    replace_dit_with_tensorrt(policy, dit.parent)
    found, expected = call(policy)
    assert same(found, expected)


def test_a_float_timestep_stops_the_loop_by_name(dit: Any) -> None:
    policy = groot_rig.policy()
    replace_dit_with_tensorrt(policy, dit)
    given = dit_inputs(s=20, sa=5)
    given.timestep = given.timestep.float()
    with pytest.raises(DTypeError, match="'timestep'"):
        policy.model.action_head.model(*list(given)[:3], None, False, *list(given)[3:])


@pytest.mark.parametrize("head", [standin.ActionHeadN16, standin.ActionHeadN17])
def test_a_whole_action_head_runs_over_it(dit: Any, head: Any) -> None:
    """The head's own loop, in torch, with the engine in it: the same as with the engine's arithmetic in its place."""
    replaced, by_hand = groot_rig.policy(head=head), groot_rig.policy(head=head)
    replace_dit_with_tensorrt(replaced, dit)
    steps = []

    def forward(
        hidden_states: Any, encoder_hidden_states: Any, timestep: Any, image_mask: Any, backbone_attention_mask: Any
    ) -> Any:
        given = (hidden_states, encoder_hidden_states, timestep, image_mask, backbone_attention_mask)
        steps.append(int(timestep[0].item()))
        return torch.tensor(groot_rig.Inputs(*given).expected()).to(torch.bfloat16).to("cuda")

    by_hand.model.action_head.model.forward = forward
    actions = []
    for policy in (replaced, by_hand):
        torch.manual_seed(3)
        with torch.inference_mode():
            actions.append(policy.model.action_head.get_action(*head_inputs())["action_pred"])
    assert steps == [0, 250, 500, 750]
    assert actions[0].shape == (1, 4, 64)
    assert torch.equal(*actions)


def test_a_policy_behind_a_server(dit: Any) -> None:
    """The scripts' server has no way to engines. A policy that has them may answer in any thread."""
    policy = groot_rig.policy()
    replace_dit_with_tensorrt(policy, dit)

    def actions(seed: int) -> bytes:
        torch.manual_seed(seed)
        with torch.inference_mode():
            found = policy.model.action_head.get_action(*head_inputs(seed=seed))["action_pred"]
        return groot_rig.values(found).tobytes()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(actions(int(self.rfile.readline())))

    expected = [actions(seed) for seed in range(3)]
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            for seed in (2, 0, 1, 2):
                with socket.create_connection(server.server_address, timeout=30) as client, client.makefile("rwb") as f:
                    f.write(b"%d\n" % seed)
                    f.flush()
                    assert f.read() == expected[seed]
        finally:
            server.shutdown()
            serving.join()


# The backbone ---------------------------------------------------------------------------------------------------------


def features(rank: int = 4, s: int = 20) -> standin.BatchFeature:
    return standin.BatchFeature(data=backbone_inputs(rank=rank, s=s))


def test_agx_backbone_masks_come_from_torch(plan: groot_rig.Write) -> None:
    policy = groot_rig.policy()
    backbone = policy.model.backbone
    assert replace_backbone_with_tensorrt(policy, str(plan(one_output()))) is None
    assert policy.model.backbone is backbone
    given = features()
    found = policy.model.backbone(given)
    assert type(found) is standin.BatchFeature
    assert torch.equal(found["backbone_features"], given["pixel_values"])
    assert torch.equal(found.backbone_attention_mask, given["attention_mask"] == 1)
    assert torch.equal(found.image_mask, given["input_ids"] == 7)


def test_nx_backbone_masks_come_from_the_engine(plan: groot_rig.Write) -> None:
    policy = groot_rig.policy()
    wrapper = TensorRTBackboneWrapper(plan(three_outputs()))
    replace_backbone_with_tensorrt(policy, "/nowhere", 0, wrapper)
    given = features(5)
    found = policy.model.backbone(given)
    assert torch.equal(found.backbone_features, given["pixel_values"])
    assert torch.equal(found.backbone_attention_mask, given["attention_mask"])
    assert torch.equal(found.image_mask, given["input_ids"])


def test_the_backbone_stays_a_module_with_its_hooks(plan: groot_rig.Write) -> None:
    """A plain object in a registered module's place is a TypeError of torch's."""
    policy = groot_rig.policy()
    with pytest.raises(TypeError):
        policy.model.backbone = SimpleNamespace(forward=None)
    seen = []
    policy.model.backbone.register_forward_hook(lambda module, args, output: seen.append(list(output)))
    replace_backbone_with_tensorrt(policy, plan(one_output()), free_torch=True)
    assert isinstance(policy.model.backbone, nn.Module)
    policy.model.backbone(policy.model.backbone.prepare_input(dict(features())))
    assert seen == [["backbone_features", "backbone_attention_mask", "image_mask"]]
    assert policy.model.dtype is torch.bfloat16
    assert policy.model.device == torch.device("cuda", 0)
    assert sum(p.numel() for p in policy.model.backbone.parameters()) == 0


def test_a_policy_without_its_backbone(plan: groot_rig.Write) -> None:
    policy = groot_rig.policy()
    policy.model.backbone = None
    replace_backbone_with_tensorrt(policy, plan(three_outputs()))
    assert isinstance(policy.model.backbone, nn.Module)
    prepared = policy.model.backbone.prepare_input(dict(features(5)))
    found = policy.model.backbone(prepared)
    assert torch.equal(found["backbone_features"], prepared["pixel_values"])
    assert torch.equal(found.image_mask, prepared.input_ids)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        found.nothing_of_that_name  # noqa: B018


def test_an_engine_without_masks_needs_the_image_token(plan: groot_rig.Write) -> None:
    path = plan(one_output())
    policy = groot_rig.policy()
    policy.model.backbone = None
    with pytest.raises(InputNameError, match=r"found the outputs backbone_features, without masks.*image_token_id="):
        replace_backbone_with_tensorrt(policy, path)
    assert policy.model.backbone is None
    replace_backbone_with_tensorrt(policy, path, image_token_id=3)
    given = features()
    assert torch.equal(policy.model.backbone(given).image_mask, given["input_ids"] == 3)


@pytest.mark.parametrize("name", ["image_token_index", "image_token_id"])
@pytest.mark.parametrize("place", ["config", "model"])
def test_the_image_token_is_found_where_the_versions_have_it(plan: groot_rig.Write, name: str, place: str) -> None:
    policy = groot_rig.policy()
    model = policy.model.backbone.model
    del model.config
    if place == "config":
        model.config = SimpleNamespace(**{name: 5})
    else:
        setattr(model, name, 5)
    replace_backbone_with_tensorrt(policy, plan(one_output()))
    given = features()
    assert torch.equal(policy.model.backbone(given).image_mask, given["input_ids"] == 5)


def test_views_in_a_list_and_further_inputs(plan: groot_rig.Write) -> None:
    """N1.7's backbone has the grid of its images, too; what the engine has no input for is left out."""
    engine = one_output()
    engine["io"].insert(3, tensor("image_grid_thw", "input", "int64", [2, 3]))
    policy = groot_rig.policy()
    replace_backbone_with_tensorrt(policy, plan(engine))
    views = [torch.randn(1, 3, 4, 4, device="cuda") for _ in range(2)]
    given = features()
    given["pixel_values"] = views
    given["image_grid_thw"] = torch.ones(2, 3, dtype=torch.int64, device="cuda")
    given["something_else"] = "text"
    assert torch.equal(policy.model.backbone(given)["backbone_features"], torch.cat(views))
    del given["image_grid_thw"]
    with pytest.raises(InputNameError, match="image_grid_thw"):
        policy.model.backbone(given)


def test_the_features_have_the_type_of_the_policy(plan: groot_rig.Write) -> None:
    policy = groot_rig.policy()
    replace_backbone_with_tensorrt(policy, plan(one_output()))
    given = features()
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    found = policy.model.backbone(given)["backbone_features"]
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, given["pixel_values"])


def test_both_replaced_and_everything_freed(plan: groot_rig.Write, dit: Any) -> None:
    policy = groot_rig.policy()
    replace_backbone_with_tensorrt(policy, plan(one_output(), name="b.plan"), free_torch=True)
    replace_dit_with_tensorrt(policy, dit, free_torch=True)
    assert next(policy.model.parameters()).dtype is torch.bfloat16
    found, expected = call(policy)
    assert same(found, expected)
