"""The wrappers: what they accept, cast, refuse, return and reuse (seam A, and the forks' variants of it)."""

from __future__ import annotations

import inspect
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import groot_rig
import numpy as np
import pytest
import rig
import torch
from groot_rig import dit_inputs, dit_io, maskless_io, same, values

from fakes import tensor
from jetrt.errors import (
    ClosedEngineError,
    DTypeError,
    InferenceError,
    InputNameError,
    LayoutError,
    PlanError,
    ShapeError,
)
from jetrt.graph import graph
from jetrt.groot import TensorRTBackboneWrapper, TensorRTDiTWrapper, load_report
from jetrt.groot.wrappers import may_cast

pytestmark = pytest.mark.usefixtures("clean")


# Rows of seam A: constructor ------------------------------------------------------------------------------------------


def test_signatures_are_the_scripts() -> None:
    made = inspect.signature(TensorRTDiTWrapper).parameters
    assert list(made)[:3] == ["engine_path", "device", "use_fp16_output"]
    assert made["device"].default == 0
    assert made["use_fp16_output"].default is False
    assert list(inspect.signature(TensorRTBackboneWrapper).parameters)[:2] == ["engine_path", "device"]
    called = inspect.signature(TensorRTDiTWrapper.__call__).parameters
    assert list(called)[1:] == ["sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask"]
    assert called["image_mask"].default is called["backbone_attention_mask"].default is None


def test_no_cuda_no_file_and_no_plan(plan: groot_rig.Write, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as plain:
        TensorRTDiTWrapper("/nowhere/dit.engine")
    assert (plain.type, plain.value.filename) == (FileNotFoundError, "/nowhere/dit.engine")
    bad = plan("dit5").with_name("bad.engine")
    bad.write_bytes(b"PK\x03\x04 no plan at all, and long enough")
    with pytest.raises(
        RuntimeError, match=r"^Failed to load TensorRT engine from .*bad\.engine: .*zip archive"
    ) as info:
        TensorRTDiTWrapper(bad)
    assert isinstance(info.value.__cause__, PlanError)
    with pytest.raises(RuntimeError, match=r"^Failed to load backbone TensorRT engine from "):
        TensorRTBackboneWrapper(bad)
    refused = plan("dit5", name="refused.engine", fail="deserialize")
    with pytest.raises(RuntimeError, match=r"^Failed to load TensorRT engine from "):
        TensorRTDiTWrapper(refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^CUDA not available for TensorRT$"):
        TensorRTDiTWrapper(plan("dit5"))


def test_devices_are_named_in_any_way(plan: groot_rig.Write) -> None:
    path = plan("dit5")
    for device in (0, "cuda:0", "cuda", torch.device("cuda", 0), torch.device("cuda")):
        wrapper = TensorRTDiTWrapper(path, device)
        assert wrapper.device == 0
        wrapper.close()
    with pytest.raises(ValueError, match=r"^device: found 'cpu'; allowed: a CUDA device"):
        TensorRTDiTWrapper(path, "cpu")


def test_a_folder_is_the_plan_that_the_scripts_would_take(plan: groot_rig.Write) -> None:
    folder = plan("dit5", name="dit_model_bf16.trt").parent
    assert TensorRTDiTWrapper(folder).engine_path.endswith("dit_model_bf16.trt")
    plan("dit5", name="dit_model_bf16.engine")
    assert TensorRTDiTWrapper(folder).engine_path.endswith("dit_model_bf16.engine")
    plan("dit5", name="dit_bf16.engine")
    assert TensorRTDiTWrapper(folder).engine_path.endswith("dit_bf16.engine")
    with pytest.raises(FileNotFoundError, match="backbone"):
        TensorRTBackboneWrapper(folder)
    plan(three_outputs(), name="backbone_int8.trt")
    assert TensorRTBackboneWrapper(folder).engine_path.endswith("backbone_int8.trt")
    plan(three_outputs(), name="eagle_backbone_fp16.engine")
    with pytest.raises(FileNotFoundError, match=r"several backbones \(backbone_int8.trt, eagle_backbone_fp16.engine\)"):
        TensorRTBackboneWrapper(folder)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"dit_bf16\.engine, dit_model_bf16\.engine, dit_model_bf16\.trt"):
        TensorRTDiTWrapper(folder / "empty")


def test_attributes_that_others_read(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    engine = wrapper.engine
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert names == ["sa_embs", "vl_embs", "timestep", "image_mask", "backbone_attention_mask", "output"]
    assert tuple(engine.get_tensor_shape("vl_embs")) == (1, -1, 64)
    assert [tuple(s) for s in engine.get_tensor_profile_shape("vl_embs", 0)] == [(1, 1, 64), (1, 122, 64), (1, 512, 64)]
    assert engine.get_tensor_dtype("timestep").name == "INT64"
    assert [engine.get_tensor_mode(n).name for n in ("timestep", "output")] == ["INPUT", "OUTPUT"]
    assert tuple(wrapper.context.get_tensor_shape("output")) == (1, 41, 64)
    assert wrapper.input_dtypes["image_mask"] is torch.bool
    assert wrapper.output_dtypes == {"output": torch.bfloat16}
    assert wrapper.trt_logger.name == "jetrt"
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert wrapper.stream == side


def test_an_engine_that_is_no_dit_is_refused(plan: groot_rig.Write) -> None:
    before = rig.trt().live("ICudaEngine")
    with pytest.raises(InputNameError, match=r"found the inputs x; allowed: sa_embs, vl_embs, timestep"):
        TensorRTDiTWrapper(plan("mlp"))
    optimised = [tensor("sa_embs", "input", "float16", [1, 41, 64]), tensor("cross_keys", "input", "float16", [1, 64])]
    optimised.append(tensor("output", "output", "float16", [1, 41, 64]))
    with pytest.raises(InputNameError, match=r"cross_keys.*jetrt\.trt_torch\.Engine"):
        TensorRTDiTWrapper(plan({"program": "copy", "io": optimised}))
    two = [*maskless_io()[:-1], tensor("a", "output", "bfloat16", [1, 41, 64])]
    with pytest.raises(InputNameError, match=r"found the outputs a, b; allowed: one output"):
        TensorRTDiTWrapper(
            plan({"program": "copy", "io": [*two, tensor("b", "output", "bfloat16", [1, -1, 64])]}, name="two.plan")
        )
    assert rig.trt().live("ICudaEngine") == before


def test_ring_and_output_dtype_are_checked(plan: groot_rig.Write) -> None:
    with pytest.raises(ValueError, match=r"^ring: found -1"):
        TensorRTDiTWrapper(plan("dit5"), ring=-1)
    with pytest.raises(ValueError, match=r"^ring: found 3; .*cache_outputs=True is ring=1"):
        TensorRTDiTWrapper(plan("dit5"), ring=3, cache_outputs=True)
    with pytest.raises(ValueError, match=r"^output_dtype: found torch.float32, and use_fp16_output=True"):
        TensorRTDiTWrapper(plan("dit5"), use_fp16_output=True, output_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^outputs: found 'list'"):
        TensorRTBackboneWrapper(plan(three_outputs()), outputs="list")  # type: ignore[arg-type]


# Rows of seam A: a call -----------------------------------------------------------------------------------------------


def test_by_position_and_by_name(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    assert same(wrapper(*given), given.expected())
    assert same(wrapper(**vars(given)), given.expected())
    found = wrapper(given.sa_embs, given.vl_embs, timestep=given.timestep, **masks(given))
    assert same(found, given.expected())


def masks(given: groot_rig.Inputs) -> dict[str, torch.Tensor]:
    return {"image_mask": given.image_mask, "backbone_attention_mask": given.backbone_attention_mask}


def test_sequence_lengths_change_from_call_to_call(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    for s in (122, 1, 512, 122, 300):
        given = dit_inputs(seed=s, s=s)
        assert same(wrapper(*given), given.expected())


def test_neither_waits_nor_allocates_nor_fills(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    for _ in range(3):
        wrapper(*given)
    before = dict(torch._standin.counts)
    rig.cuda().reset()
    rig.trt().reset()
    for _ in range(50):
        wrapper(*given)
    assert rig.trt().count("enqueueV3") == 50
    assert dict(torch._standin.counts) == before
    called = set(rig.cuda().log())
    assert not [name for name in called if "Alloc" in name or "Memset" in name or "Synchronize" in name]
    assert wrapper.core.stats["waits"] == 0
    assert wrapper.core.stats["casts"] == wrapper.core.stats["strided_copies"] == 0


def test_a_tensor_of_another_kind_is_refused_by_name(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    with pytest.raises(DTypeError, match=r"^input 'timestep': found int; allowed: torch.Tensor"):
        wrapper(given.sa_embs, given.vl_embs, 250, **masks(given))
    with pytest.raises(DTypeError, match=r"^input 'vl_embs': found ndarray; allowed: torch.Tensor"):
        wrapper(given.sa_embs, values(given.vl_embs), given.timestep, **masks(given))
    assert wrapper.core.stats["calls"] == 0


def test_masks_rule(plan: groot_rig.Write) -> None:
    """None is left out; an engine that has none of them warns once; an engine that has them needs them."""
    with_masks = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    with pytest.raises(InputNameError, match=r"^input 'image_mask': found nothing \(the input is missing\)"):
        with_masks(given.sa_embs, given.vl_embs, given.timestep)
    with pytest.raises(InputNameError, match=r"^input 'backbone_attention_mask': found nothing"):
        with_masks(given.sa_embs, given.vl_embs, given.timestep, given.image_mask)
    assert with_masks.core.stats["calls"] == 0

    without = TensorRTDiTWrapper(plan({"program": "copy", "io": maskless_io()}, name="maskless.plan"))
    assert torch.equal(without(given.sa_embs, given.vl_embs, given.timestep), given.sa_embs)
    with pytest.warns(RuntimeWarning, match=r"no input 'image_mask' or 'backbone_attention_mask'"):
        assert torch.equal(without(*given), given.sa_embs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(without(*given), given.sa_embs)


def test_the_timestep_of_n1_5_has_another_name(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan({"program": "copy", "io": maskless_io("float16", "timesteps_tensor")}))
    given = dit_inputs(floats=torch.float16)
    assert torch.equal(wrapper(given.sa_embs, given.vl_embs, given.timestep), given.sa_embs)


def test_inputs_come_in_the_order_of_the_engine(plan: groot_rig.Write) -> None:
    io = maskless_io()
    io = [io[0], io[2], io[1], io[3]]  # timestep before vl_embs
    wrapper = TensorRTDiTWrapper(plan({"program": "copy", "io": io}))
    given = dit_inputs()
    assert torch.equal(wrapper(given.sa_embs, given.vl_embs, given.timestep), given.sa_embs)


def test_shapes_out_of_the_profile_are_refused_before_anything_runs(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs(s=513)
    with pytest.raises(ShapeError, match=r"^input 'vl_embs': found \[1, 513, 64\]; allowed: \[1, 1\.\.512, 64\]"):
        wrapper(*given)
    short = dit_inputs(sa=40)
    with pytest.raises(ShapeError, match=r"^input 'sa_embs'"):
        wrapper(*short)
    assert rig.trt().count("enqueueV3") == 0
    wrapper(*dit_inputs())
    assert rig.trt().count("enqueueV3") == 1


def test_a_failing_engine_says_so_in_the_scripts_words(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5", fail="enqueue", log=[[1, "boom"]]))
    with pytest.raises(RuntimeError, match=r"^TensorRT inference failed: ") as info:
        wrapper(*dit_inputs())
    assert isinstance(info.value.__cause__, InferenceError)
    backbone = TensorRTBackboneWrapper(plan({**three_outputs(), "fail": "enqueue"}, name="b.plan"))
    with pytest.raises(RuntimeError, match=r"^Backbone TensorRT inference failed: "):
        backbone(**backbone_inputs())


def test_close_frees_the_engine_and_keeps_results(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"), ring=2)
    given = dit_inputs()
    kept = wrapper(*given)
    wrapper.close()
    wrapper.close()
    assert rig.trt().live("ICudaEngine") == 0
    assert same(kept, given.expected())
    with pytest.raises(ClosedEngineError):
        wrapper(*given)


# Types: exactly, or refused -------------------------------------------------------------------------------------------

EXACT = [
    ("float32", "bfloat16"),
    ("float16", "float32"),
    ("float64", "float16"),
    ("int32", "int64"),
    ("uint8", "int32"),
    ("uint8", "int16"),
    ("bool", "int64"),
    ("bool", "bfloat16"),
    ("int64", "bool"),
    ("float32", "bool"),
    ("uint8", "bool"),
]
REFUSED = [
    ("float32", "int64"),
    ("bfloat16", "int32"),
    ("int64", "int32"),
    ("int64", "bfloat16"),
    ("int32", "float32"),
    ("int8", "uint8"),
    ("uint8", "int8"),
    ("uint64", "int64"),
    ("complex64", "float32"),
    ("float8_e4m3fn", "float32"),
    ("complex64", "bool"),
]


@pytest.mark.parametrize(("found", "wanted"), EXACT)
def test_casts_that_keep_the_meaning(found: str, wanted: str) -> None:
    assert may_cast(found, wanted)


@pytest.mark.parametrize(("found", "wanted"), REFUSED)
def test_casts_that_would_guess(found: str, wanted: str) -> None:
    assert not may_cast(found, wanted)


def test_native_casts_are_exact_and_counted(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    numbers = torch.arange(122).reshape(1, 122).to("cuda") % 3  # 0 is False, 1 and 2 are True
    other = groot_rig.Inputs(
        given.sa_embs.float(),
        given.vl_embs.to(torch.float16),
        given.timestep.to(torch.int32),
        numbers,
        given.backbone_attention_mask.to(torch.float32) * 0.25,
    )
    expected = groot_rig.Inputs(
        given.sa_embs,
        given.vl_embs.to(torch.float16).to(torch.bfloat16),
        given.timestep,
        numbers != 0,
        given.backbone_attention_mask,
    ).expected()
    assert same(wrapper(*other), expected)
    assert wrapper.core.stats["casts"] == 5


def test_a_float_timestep_is_refused_by_name(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    with pytest.raises(
        DTypeError, match=r"^input 'timestep': found float32; allowed: int64, .*x\.to\(torch\.int64\)"
    ) as i:
        wrapper(given.sa_embs, given.vl_embs, given.timestep.float(), **masks(given))
    assert (i.value.tensor, i.value.found, i.value.allowed) == ("timestep", "float32", "int64")
    assert wrapper.core.stats["calls"] == 0
    # What was accepted stays accepted, what was refused stays refused.
    wrapper(*given)
    with pytest.raises(DTypeError):
        wrapper(given.sa_embs, given.vl_embs, given.timestep.float(), **masks(given))


def test_an_int64_timestep_for_an_int32_engine_is_refused(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5", io=dit_io(timestep="int32")))
    with pytest.raises(DTypeError, match=r"^input 'timestep': found int64; allowed: int32"):
        wrapper(*dit_inputs())


def test_nx_defect_masks_and_timesteps_keep_their_type(plan: groot_rig.Write) -> None:
    """The fork's table has no int64 and no bool and casts both to bfloat16 before it binds them."""
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    assert wrapper.input_dtypes["timestep"] is torch.int64
    assert wrapper.input_dtypes["image_mask"] is torch.bool
    given = dit_inputs(seed=7)
    given.timestep.fill_(257)  # not a bfloat16
    assert same(wrapper(*given), given.expected())
    assert wrapper.core.stats["casts"] == 0


@pytest.mark.parametrize("floats", ["float32", "float16", "bfloat16"])
def test_the_output_has_the_type_of_the_engine(plan: groot_rig.Write, floats: str) -> None:
    """A float output that is read as bfloat16 is what the forks' figures came from."""
    wrapper = TensorRTDiTWrapper(plan("dit5", io=dit_io(floats=floats)))
    given = dit_inputs()  # bfloat16: cast to the engine's type natively
    found = wrapper(*given)
    assert found.dtype is getattr(torch, floats)
    assert same(found, given.expected(floats))


def test_output_dtype_is_a_cast(plan: groot_rig.Write) -> None:
    path = plan("dit5")
    given = dit_inputs()
    assert TensorRTDiTWrapper(path, output_dtype=torch.float32)(*given).dtype is torch.float32
    half = TensorRTDiTWrapper(path, use_fp16_output=True)
    assert half(*given).dtype is torch.float16
    assert same(half(*given), groot_rig.rounded(given.expected(), "float16"))


# Devices, layouts, modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["sa_embs", "vl_embs", "timestep", "image_mask", "all"])
def test_tensors_on_the_cpu_are_moved(plan: groot_rig.Write, which: str) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    expected = given.expected()
    for name in vars(given) if which == "all" else [which]:
        setattr(given, name, getattr(given, name).cpu())
    found = wrapper(*given)
    assert found.device == torch.device("cuda", 0)
    assert same(found, expected)


def test_strided_expanded_and_offset_tensors(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    wide = torch.zeros(1, 41, 128, device="cuda", dtype=torch.bfloat16)
    wide[:, :, :64].copy_(given.sa_embs)
    turned = given.vl_embs.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([torch.zeros(3, device="cuda", dtype=torch.int64), given.timestep])
    strided = groot_rig.Inputs(wide[:, :, :64], turned, both[3:], *masks(given).values())
    assert same(wrapper(*strided), given.expected())
    stats = wrapper.core.stats
    assert stats["strided_copies"] == 3
    row = torch.ones(1, 1, 64, device="cuda", dtype=torch.bfloat16)
    repeated = groot_rig.Inputs(row.expand(1, 41, 64), *list(given)[1:])
    assert same(wrapper(*repeated), repeated.expected())


def test_a_tensor_that_requires_grad_ends_its_gradient_here(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    given.sa_embs.requires_grad_()
    expected = groot_rig.Inputs(given.sa_embs.detach(), *list(given)[1:]).expected()
    found = wrapper(*given)
    assert not found.requires_grad
    assert same(found, expected)
    with torch.inference_mode():
        assert same(wrapper(*given), expected)
    with torch.no_grad():
        assert same(wrapper(*given), expected)


def test_a_lazily_negated_tensor_is_refused(plan: groot_rig.Write, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = dit_inputs()
    monkeypatch.setattr(torch.Tensor, "is_neg", lambda t: t is given.sa_embs)
    with pytest.raises(LayoutError, match="negated"):
        wrapper(*given)


def test_several_threads_share_a_wrapper(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                given = dit_inputs(seed=seed * 100 + i, s=1 + (seed * 37 + i * 11) % 512)
                assert same(wrapper(*given), given.expected())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


# Reuse of outputs -----------------------------------------------------------------------------------------------------


def test_by_default_results_stay_valid(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = [dit_inputs(seed=i, s=5 + i) for i in range(12)]
    found = [wrapper(*one) for one in given]
    assert len({t.data_ptr() for t in found}) == len(found)
    for one, expected in zip(found, given, strict=True):
        assert same(one, expected.expected())
    assert wrapper.output_generation == 12


def test_cache_outputs_gives_one_buffer(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"), cache_outputs=True)
    addresses = set()
    for i in range(6):
        given = dit_inputs(seed=i)
        found = wrapper(*given)
        addresses.add(found.data_ptr())
        assert same(found, given.expected())
        assert wrapper.output_generation == i + 1
    assert len(addresses) == 1


@pytest.mark.parametrize("ring", [1, 2, 3])
def test_a_ring_keeps_the_last_n(plan: groot_rig.Write, ring: int) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"), ring=ring)
    found: list[tuple[torch.Tensor, np.ndarray[Any, Any]]] = []
    for i in range(10):
        given = dit_inputs(seed=i)
        found.append((wrapper(*given), given.expected()))
        if i == 4:
            with pytest.raises(DTypeError):
                wrapper(given.sa_embs, given.vl_embs, given.timestep.float(), **masks(given))
            with pytest.raises(ShapeError):  # a refused call writes nothing, and takes no turn
                wrapper(*dit_inputs(s=513))
        for one, expected in found[-ring:]:
            assert same(one, expected)
    assert len({one.data_ptr() for one, _ in found}) == ring
    assert wrapper.output_generation == 10


def test_a_ring_does_not_grow_with_the_sequence_lengths(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"), ring=2)
    for s in [*range(1, 60), *range(1, 60)]:
        given = dit_inputs(seed=s, s=s)
        assert same(wrapper(*given), given.expected())
    assert wrapper.core.stats["output_allocations"] <= 4


def test_a_ring_is_written_inside_inference_mode_and_outside(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"), ring=1)
    given = dit_inputs()
    with torch.inference_mode():
        first = wrapper(*given)
        assert not first.is_inference()
    again = wrapper(*dit_inputs(seed=1))
    again.add_(0)  # an inference tensor would refuse that here
    with torch.inference_mode():
        assert same(wrapper(*given), given.expected())


def test_inside_a_capture_a_ring_gives_the_graph_its_own_buffers(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"), cache_outputs=True)
    given = dit_inputs()
    live = wrapper(*given)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        captured = wrapper(*given)
    assert captured.data_ptr() != live.data_ptr()
    other = dit_inputs(seed=3)
    live = wrapper(*other)
    cuda_graph.replay()
    assert same(captured, given.expected())
    assert same(live, other.expected())
    del captured
    cuda_graph.reset()
    wrapper.close()


@pytest.mark.parametrize("options", [{}, {"ring": 2}])
def test_in_a_graph_of_a_loop(plan: groot_rig.Write, options: dict[str, Any]) -> None:
    """Four steps over the wrapper as one CUDA graph: the same bits as one by one."""
    wrapper = TensorRTDiTWrapper(plan("dit5"), **options)

    def loop(*given: torch.Tensor) -> torch.Tensor:
        hidden = given[0]
        for _ in range(4):
            hidden = hidden - wrapper(hidden, *given[1:]) * 0.25
        return hidden

    captured = graph(loop, tuple(dit_inputs()))
    for seed in range(3):
        given = dit_inputs(seed=seed)
        with torch.inference_mode():
            found = captured(*given)
        assert torch.equal(found, loop(*given))
    assert captured.stats["replays"] == 3, captured.stats
    captured.close()


def test_deterministic_mode_fills_nothing(plan: groot_rig.Write) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    for options in ({}, {"ring": 2}):
        wrapper = TensorRTDiTWrapper(plan("dit5"), **options)
        given = dit_inputs()
        for _ in range(4):
            wrapper(*given)
        before = torch._standin.counts["fills"]
        for _ in range(20):
            wrapper(*given)
        assert torch._standin.counts["fills"] == before
        assert same(wrapper(*given), given.expected())


# The forks' backbone --------------------------------------------------------------------------------------------------


def three_outputs(rank: int = 5, pixels: str = "float32") -> dict[str, Any]:
    """One fork's engine; it copies, so that hidden_states are the pixels."""
    ids = [([1, 1], [1, 20], [1, 64])]
    shape = [-1, 1, 3, 4, 4] if rank == 5 else [-1, 3, 4, 4]
    profile = [tuple([n, *shape[1:]] for n in (1, 2, 8))]
    return {
        "program": "copy",
        "io": [
            tensor("pixel_values", "input", pixels, shape, profile),
            tensor("attention_mask", "input", "int64", [1, -1], ids),
            tensor("input_ids", "input", "int64", [1, -1], ids),
            tensor("hidden_states", "output", pixels, shape),
            tensor("attn_mask", "output", "int64", [1, -1]),
            tensor("image_mask", "output", "int64", [1, -1]),
        ],
    }


def one_output(pixels: str = "float32") -> dict[str, Any]:
    """The other fork's: features alone, pixels of rank 4."""
    io = three_outputs(4, pixels)["io"]
    return {"program": "copy", "io": [*io[:3], {**io[3], "name": "backbone_features"}]}


def backbone_inputs(views: int = 2, rank: int = 5, s: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(seed)
    shape = (views, 1, 3, 4, 4) if rank == 5 else (views, 3, 4, 4)
    return {
        "pixel_values": torch.tensor(draw.standard_normal(shape).astype(np.float32)).to("cuda"),
        "input_ids": torch.tensor(draw.integers(0, 9, (1, s))).to("cuda"),
        "attention_mask": torch.tensor(draw.integers(0, 2, (1, s))).to("cuda"),
    }


def test_agx_order_and_one_tensor(plan: groot_rig.Write) -> None:
    backbone = TensorRTBackboneWrapper(plan(one_output()))
    given = backbone_inputs(rank=4)
    for found in (
        backbone(given["pixel_values"], given["input_ids"], given["attention_mask"]),
        backbone(given["pixel_values"], given["input_ids"], attention_mask=given["attention_mask"]),
        backbone(given["input_ids"], given["attention_mask"], given["pixel_values"]),
        backbone(**given),
    ):
        assert isinstance(found, torch.Tensor)
        assert found.dtype is torch.float32
        assert torch.equal(found, given["pixel_values"])


def test_nx_order_and_the_tuple(plan: groot_rig.Write) -> None:
    backbone = TensorRTBackboneWrapper(plan(three_outputs()))
    ids = torch.int64
    assert backbone.input_dtypes == {"pixel_values": torch.float32, "attention_mask": ids, "input_ids": ids}
    assert backbone.output_dtypes == {"hidden_states": torch.float32, "attn_mask": ids, "image_mask": ids}
    assert backbone.stream == torch.cuda.current_stream()
    given = backbone_inputs()
    for found in (
        backbone(given["input_ids"], given["attention_mask"], given["pixel_values"]),
        backbone(given["input_ids"], given["attention_mask"], pixel_values=given["pixel_values"]),
        backbone(given["pixel_values"], given["input_ids"], given["attention_mask"]),
        backbone(**given),
    ):
        assert isinstance(found, tuple)
        hidden, attended, image = found
        assert torch.equal(hidden, given["pixel_values"])
        assert torch.equal(attended, given["attention_mask"])
        assert torch.equal(image, given["input_ids"])


def test_the_tuple_of_nx_is_not_aliased(plan: groot_rig.Write) -> None:
    """The fork hands out the buffers that its next call overwrites; here that is asked for."""
    path = plan(three_outputs())
    first, second = backbone_inputs(seed=1), backbone_inputs(seed=2)
    backbone = TensorRTBackboneWrapper(path)
    kept = backbone(**first)[0]
    backbone(**second)
    assert torch.equal(kept, first["pixel_values"])
    cached = TensorRTBackboneWrapper(path, cache_outputs=True)
    kept = cached(**first)[0]
    assert torch.equal(cached(**second)[0], kept)


def test_views_are_joined_as_the_engine_takes_them(plan: groot_rig.Write) -> None:
    views = [torch.randn(1, 3, 4, 4, device="cuda") for _ in range(2)]
    ids = {"input_ids": torch.ones(1, 5, dtype=torch.int64, device="cuda")}
    ids["attention_mask"] = ids["input_ids"]
    five = TensorRTBackboneWrapper(plan(three_outputs()))
    stacked = torch.stack([view.squeeze(0) for view in views]).unsqueeze(1)
    assert torch.equal(five(ids["input_ids"], ids["attention_mask"], views)[0], stacked)
    assert torch.equal(five(ids["input_ids"], ids["attention_mask"], [v.squeeze(0) for v in views])[0], stacked)
    four = TensorRTBackboneWrapper(plan(one_output(), name="four.plan"))
    assert torch.equal(four(views, ids["input_ids"], ids["attention_mask"]), torch.cat(views))
    assert torch.equal(four(tuple(v.squeeze(0) for v in views), **ids), torch.cat(views))


@pytest.mark.parametrize("outputs", ["auto", "tuple", "features", "dict"])
def test_outputs(plan: groot_rig.Write, outputs: Any) -> None:
    given = backbone_inputs()
    found = TensorRTBackboneWrapper(plan(three_outputs()), outputs=outputs)(**given)
    if outputs == "dict":
        assert list(found) == ["hidden_states", "attn_mask", "image_mask"]
    elif outputs == "features":
        assert torch.equal(found, given["pixel_values"])
    else:
        assert isinstance(found, tuple)
    one = plan(one_output(), name="one.plan")
    if outputs == "tuple":
        with pytest.raises(InputNameError, match=r"the outputs backbone_features; allowed: a backbone with attn_mask"):
            TensorRTBackboneWrapper(one, outputs="tuple")
    elif outputs == "dict":
        assert list(TensorRTBackboneWrapper(one, outputs="dict")(**backbone_inputs(rank=4))) == ["backbone_features"]


def test_other_outputs_come_as_a_dict(plan: groot_rig.Write) -> None:
    io = three_outputs()["io"]
    found = TensorRTBackboneWrapper(plan({"program": "copy", "io": io[:5]}))(**backbone_inputs())
    assert list(found) == ["hidden_states", "attn_mask"]


def test_an_engine_without_pixels_is_no_backbone(plan: groot_rig.Write) -> None:
    with pytest.raises(InputNameError, match="a backbone with an input pixel_values"):
        TensorRTBackboneWrapper(plan("mlp"))


def test_order_of_the_backbone_that_cannot_be_told(plan: groot_rig.Write) -> None:
    backbone = TensorRTBackboneWrapper(plan(three_outputs()))
    given = backbone_inputs()
    ids, attended, pixels = given["input_ids"], given["attention_mask"], given["pixel_values"]
    with pytest.raises(InputNameError, match=r"the pixels .* first or last"):
        backbone(ids, pixels, attended)
    with pytest.raises(InputNameError, match=r"the pixels .* first or last"):
        backbone(ids, attended, ids)
    with pytest.raises(InputNameError, match=r"the pixels .* first or last"):
        backbone(pixels, ids, pixels)
    with pytest.raises(InputNameError, match="found 4 positional arguments"):
        backbone(ids, attended, pixels, ids)
    with pytest.raises(InputNameError, match=r"^input 'input_ids': found it by position and by name"):
        backbone(ids, input_ids=ids, pixel_values=pixels)
    with pytest.raises(InputNameError, match=r"^input 'attention_mask': found nothing"):
        backbone(input_ids=ids, pixel_values=pixels)
    assert backbone.core.stats["calls"] == 0


def test_a_profile_violation_is_an_error_and_not_a_line_in_a_log(plan: groot_rig.Write) -> None:
    backbone = TensorRTBackboneWrapper(plan(three_outputs()))
    with pytest.raises(ShapeError, match=r"^input 'attention_mask': found \[1, 65\]"):
        backbone(**backbone_inputs(s=65))


def test_pixels_of_another_float_type_and_integers(plan: groot_rig.Write) -> None:
    backbone = TensorRTBackboneWrapper(plan(three_outputs(pixels="float16")))
    given = backbone_inputs()
    assert torch.equal(backbone(**given)[0], given["pixel_values"].to(torch.float16))
    whole = {**given, "pixel_values": given["pixel_values"].to(torch.uint8)}
    with pytest.raises(DTypeError, match=r"^input 'pixel_values': found uint8; allowed: float16"):
        backbone(**whole)
    narrow = {**given, "attention_mask": given["attention_mask"].to(torch.bool)}
    assert torch.equal(backbone(**narrow)[1], given["attention_mask"])


# The rest -------------------------------------------------------------------------------------------------------------


def test_graphs_are_off_unless_the_environment_says_auto(
    plan: groot_rig.Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plan("dit5")
    given = dit_inputs()
    wrapper = TensorRTDiTWrapper(path)
    for _ in range(8):
        wrapper(*given)
    assert wrapper.core.stats["captures"] == 0
    monkeypatch.setenv("JETRT_GRAPHS", "auto")
    wrapper = TensorRTDiTWrapper(path, ring=1)
    for _ in range(8):
        assert same(wrapper(*given), given.expected())
    assert wrapper.core.stats["captures"] >= 1
    monkeypatch.setenv("JETRT_GRAPHS", "sometimes")
    with pytest.raises(ValueError, match="graphs"):
        TensorRTDiTWrapper(path)


def test_loads_are_reported(plan: groot_rig.Write) -> None:
    path = plan("dit5")
    count = len(load_report())
    TensorRTDiTWrapper(path)
    (row,) = load_report()[count:]
    assert row["path"] == str(path)
    assert row["bytes"] == path.stat().st_size
    assert row["seconds"] >= 0
    assert row["device_bytes"] == row["device_free_before"] - row["device_free_after"]
    assert row["peak_host_bytes"] >= 0


def test_ten_thousand_calls_do_not_grow(plan: groot_rig.Write) -> None:
    wrapper = TensorRTDiTWrapper(plan("dit5"))
    given = [dit_inputs(seed=s, s=s) for s in (3, 9, 17)]
    for i in range(50):
        wrapper(*given[i % 3])
    torch.cuda.synchronize()
    live, allocations = rig.live(), wrapper.core.stats["output_allocations"]
    for i in range(10_000):
        wrapper(*given[i % 3])
        if i % 500 == 0:
            torch.cuda.synchronize()  # the stand-in runs work only when somebody waits
    torch.cuda.synchronize()
    assert rig.live() == live
    assert wrapper.core.stats["output_allocations"] == allocations
