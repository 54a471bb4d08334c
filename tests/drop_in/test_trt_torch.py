"""`jetrt.trt_torch` keeps what the GR00T scripts' `trt_torch.py` promises, and the differences that it names."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exits
import numpy as np
import pytest
import rig
import torch

import fakes
import jetrt
from jetrt import errors
from jetrt.graph import graph
from jetrt.lookalikes import DataType, TensorIOMode
from jetrt.trt_torch import Engine, EngineAssertionError, GraphSafeEngine, PlanAssertionError, torch_type

S = 7


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JETRT_TRT_SYNCHRONIZE", "JETRT_GRAPHS", "JETRT_TRT_TABLE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def load(clean: None, plan: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """`load("dit5", cls=Engine, options…)`: closed at the end of the test."""
    made: list[Any] = []

    def make(program: Any = "dit5", /, cls: type = Engine, fields: dict[str, Any] | None = None, **options: Any) -> Any:
        path = plan(program, name=f"{len(made)}.engine", **(fields or {}))
        made.append(cls(path, **options))
        return made[-1]

    yield make
    while made:
        made.pop().close()


def dit_inputs(length: int = S, seed: int = 0, device: str = "cuda") -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)

    def bf16(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.standard_normal(shape), dtype=torch.bfloat16, device=device)

    return {
        "sa_embs": bf16(1, 41, 64),
        "vl_embs": bf16(1, length, 64),
        "timestep": torch.tensor([250], device=device),
        "image_mask": torch.tensor(rng.random((1, length)) > 0.3, device=device),
        "backbone_attention_mask": torch.tensor(rng.random((1, length)) > 0.3, device=device),
    }


def set_shapes(engine: Any, length: int = S) -> None:
    engine.set_runtime_tensor_shape("vl_embs", (1, length, 64))
    for name in ("image_mask", "backbone_attention_mask"):
        engine.set_runtime_tensor_shape(name, (1, length))


def expected(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    values = {k: (v.float() if v.dtype is torch.bfloat16 else v).cpu().numpy() for k, v in inputs.items()}
    full = fakes.dit5_reference(*(values[k] for k in dit_inputs()))
    return torch.tensor(full, dtype=torch.bfloat16)


def is_right(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> bool:
    return torch.equal(output.cpu(), expected(inputs))


# Construction (the row "construct") -----------------------------------------------------------------------------------


def test_signature(load: Any, plan: Any) -> None:
    engine = Engine(str(plan()), [])
    engine.close()
    engine = Engine(file=str(plan()), plugins=[])
    assert engine.file == str(plan())
    engine.close()


def test_a_plan_that_cannot_be_loaded_is_an_assertion_naming_the_file(clean: None, tmp_path: Path) -> None:
    broken = tmp_path / "broken.engine"
    broken.write_bytes(b"this is no plan at all, however long it may be")
    with pytest.raises(AssertionError) as caught:
        Engine(broken)
    assert str(caught.value).startswith(f"Failed to deserialize the cuda engine from file: {broken}")
    assert isinstance(caught.value, PlanAssertionError)
    assert isinstance(caught.value, errors.EngineDeserializeError)
    assert isinstance(caught.value.__cause__, errors.PlanError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.path) == (str(caught.value), caught.value.path)


def test_tensorrts_own_refusal_is_an_assertion_too(clean: None, plan: Any) -> None:
    with pytest.raises(AssertionError, match=r"Failed to deserialize the cuda engine from file: .*m\.plan"):
        Engine(plan("mlp", fail="deserialize"))


def test_a_missing_file(clean: None, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.engine"):
        Engine(tmp_path / "absent.engine")


def test_a_folder_is_no_plan(clean: None, plan: Any) -> None:
    """It is one in `jetrt.groot` alone, where the names of the files are known."""
    folder = plan("dit5", name="dit_bf16.engine").parent
    with pytest.raises(AssertionError, match=r"this is a directory \(with dit_bf16\.engine\)"):
        Engine(folder)
    with pytest.raises(errors.PlanError, match="this is a directory"):
        jetrt.Engine(folder)


def test_a_type_that_torch_does_not_bind(clean: None, plan: Any) -> None:
    with pytest.raises(TypeError, match="Could not resolve TensorRT datatype"):
        Engine(plan(fakes.copy_of("float8_e4m3fn", [4])))


TABLE = """Engine file: {file}
Inputs: 5
   0. sa_embs: 1x41x64 [torch.bfloat16]
   1. vl_embs: 1x-1x64 [torch.bfloat16]
   2. timestep: 1 [torch.int64]
   3. image_mask: 1x-1 [torch.bool]
   4. backbone_attention_mask: 1x-1 [torch.bool]
Outputs: 1
   0. output: 1x41x64 [torch.bfloat16]
"""


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("-1", True), ("0", True), ("1", False), ("7", False)])
def test_the_table_is_printed_on_rank_0_alone(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, rank: str | None, shown: bool
) -> None:
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    engine = load()
    text = capsys.readouterr().out
    assert text.partition("\n")[2] == (TABLE.format(file=engine.file) if shown else "")


def test_the_table_as_one_line_of_the_log(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JETRT_TRT_TABLE", "line")
    with caplog.at_level("INFO", logger="jetrt"):
        engine = load()
    assert capsys.readouterr().out == ""
    (line,) = [r.getMessage() for r in caplog.records if "Engine file" in r.getMessage()]
    assert line.startswith(f"Engine file: {engine.file}; Inputs: 5; 0. sa_embs: 1x41x64 [torch.bfloat16]; ")


def test_plugins_are_opened_for_everybody(tmp_path: Path) -> None:
    """RTLD_GLOBAL: another library finds the plugin's symbols."""
    source, library = tmp_path / "plugin.c", tmp_path / "plugin.so"
    source.write_text("int jetrt_test_plugin(void) { return 7; }")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    code = """
import ctypes, sys, fakes
from jetrt.trt_torch import Engine
engine = Engine(fakes.write_plan(sys.argv[1]), [sys.argv[2]])
assert [type(p) for p in engine.plugins] == [ctypes.CDLL] and engine.plugins[0].jetrt_test_plugin() == 7
print(ctypes.CDLL(None).jetrt_test_plugin())
"""
    done = fakes.run_python(code, str(tmp_path / "m.plan"), str(library))
    assert done.stdout.splitlines()[-1] == "7"
    with pytest.raises(OSError, match="absent"):
        Engine(fakes.write_plan(tmp_path / "n.plan"), [str(tmp_path / "absent.so")])


def test_tensorrts_own_plugins_are_there_unasked(tmp_path: Path) -> None:
    """Plans with `EfficientNMS_TRT` and the like need libnvinfer_plugin."""
    code = "import sys, fakes; from jetrt.trt_torch import Engine; Engine(sys.argv[1], []); Engine(sys.argv[1])\n"
    code += "print(fakes.FakeTrt().count('initLibNvInferPlugins'))"
    done = fakes.run_python(code, str(fakes.write_plan(tmp_path / "m.plan")))
    assert done.stdout.splitlines()[-1] == "1"


def test_nothing_is_pinned_until_exit(clean: None, plan: Any) -> None:
    engine = Engine(plan())
    seen = weakref.ref(engine)
    del engine
    gc.collect()
    assert seen() is None
    assert rig.trt().live("ICudaEngine") == rig.trt().live("IExecutionContext") == 0


# Attributes -----------------------------------------------------------------------------------------------------------


def test_metadata_in_the_engines_order(load: Any) -> None:
    engine = load()
    assert engine.in_meta == [
        ["sa_embs", (1, 41, 64), torch.bfloat16],
        ["vl_embs", (1, -1, 64), torch.bfloat16],
        ["timestep", (1,), torch.int64],
        ["image_mask", (1, -1), torch.bool],
        ["backbone_attention_mask", (1, -1), torch.bool],
    ]
    assert engine.out_meta == [["output", (1, 41, 64), torch.bfloat16]]
    assert engine.meta == [*engine.in_meta, *engine.out_meta]
    assert engine.in_meta[0][2] is torch.bfloat16
    assert engine.plugins == []
    assert engine.logger.name == "jetrt"
    assert repr(engine).startswith(f"<jetrt.trt_torch.Engine '{engine.file}': sa_embs torch.bfloat16[1, 41, 64], ")
    assert isinstance(engine.core, jetrt.Engine)


def test_the_handle_looks_like_tensorrts(load: Any) -> None:
    handle = load().handle
    assert (handle.name, handle.num_io_tensors, len(handle), handle.num_optimization_profiles) == ("dit5", 6, 6, 1)
    assert list(handle) == [handle[i] for i in range(6)] == [handle.get_tensor_name(i) for i in range(6)]
    assert handle.get_tensor_shape("vl_embs") == (1, -1, 64)
    assert handle.get_tensor_dtype("timestep") == DataType.INT64 == 8
    assert handle.get_tensor_mode("timestep") is TensorIOMode.INPUT
    assert handle.get_tensor_mode("output") is TensorIOMode.OUTPUT
    assert handle.get_tensor_mode("nonsense") is TensorIOMode.NONE
    assert handle.get_tensor_profile_shape("vl_embs", 0) == [(1, 1, 64), (1, 122, 64), (1, 512, 64)]
    assert handle.get_tensor_profile_shape("output", 0) == []
    assert handle.device_memory_size == 1024
    with pytest.raises(KeyError, match=r"nonsense.*sa_embs"):
        handle.get_tensor_shape("nonsense")


def test_enumerations_are_tensorrts_own_where_it_is_imported(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its enumerations are equal to nothing else, and `mode == trt.TensorIOMode.INPUT` would be false in silence."""
    mode, dtype = object(), object()
    package = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT=mode), DataType=SimpleNamespace(BF16=dtype))
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    handle = load().handle
    assert handle.get_tensor_mode("sa_embs") is mode
    assert handle.get_tensor_dtype("sa_embs") is dtype


def test_the_context_looks_like_tensorrts(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    context = load().execution_context
    assert context.get_tensor_shape("vl_embs") == (1, -1, 64)
    assert not context.all_binding_shapes_specified
    assert context.set_input_shape("vl_embs", [1, S, 64]) is True
    assert context.get_tensor_shape("vl_embs") == (1, S, 64)
    for name, wrong, why in [
        ("vl_embs", (1, 513, 64), r"found \[1, 513, 64\]; allowed: \[1, 1, 64\] to \[1, 512, 64\]"),
        ("vl_embs", (1, 7), r"found \[1, 7\]"),
        ("sa_embs", (1, 42, 64), r"allowed: \[1, 41, 64\] to \[1, 41, 64\]"),
        ("output", (1, 41, 64), "found no such input; allowed: sa_embs, vl_embs"),
        ("nonsense", (1,), "found no such input"),
    ]:
        caplog.clear()
        assert context.set_input_shape(name, wrong) is False
        assert len(caplog.records) == 1
        assert caplog.records[0].levelname == "ERROR"
        assert re.search(why, caplog.records[0].getMessage())
    assert context.get_tensor_shape("vl_embs") == (1, S, 64)
    context.set_input_shape("image_mask", (1, S))
    context.set_input_shape("backbone_attention_mask", (1, S))
    assert context.all_binding_shapes_specified


# dtype_of, set_runtime_tensor_shape, torch_type -----------------------------------------------------------------------


def test_dtype_of_an_input(load: Any) -> None:
    engine = load()
    assert engine.dtype_of("timestep") is torch.int64
    assert engine.dtype_of("sa_embs") is torch.bfloat16
    for name in ("output", "nonsense"):
        with pytest.raises(KeyError, match=name):
            engine.dtype_of(name)


def test_a_dynamic_dimension_must_be_set_first(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    with pytest.raises(AssertionError, match=r"set_runtime_tensor_shape\('vl_embs', \(1, 7, 64\)\)"):
        engine(**inputs)
    set_shapes(engine)
    assert is_right(engine(**inputs)["output"], inputs)
    longer = dit_inputs(S + 1)
    with pytest.raises(
        AssertionError,
        match=r"^Invalid input\[vl_embs\] shape: \(1, 8, 64\), but the expected shape is: \(1, 7, 64\)",
    ):
        engine(**longer)
    set_shapes(engine, S + 1)
    assert is_right(engine(**longer)["output"], longer)


def test_a_shape_that_the_engine_does_not_take(load: Any) -> None:
    """Ignored, as by the scripts' class; the call that then does not fit says why."""
    engine = load()
    set_shapes(engine)
    assert engine.set_runtime_tensor_shape("vl_embs", (1, 999, 64)) is None
    inputs = dit_inputs()
    assert is_right(engine(**inputs)["output"], inputs)
    with pytest.raises(AssertionError, match=r"was refused: found \[1, 999, 64\]; allowed: \[1, 1, 64\] to \[1, 512"):
        engine(**dit_inputs(999))
    engine.set_runtime_tensor_shape("nonsense", (1,))


@pytest.mark.parametrize(
    ("name", "code", "tensorrts"),
    [
        ("float32", 0, "FLOAT"),
        ("float16", 1, "HALF"),
        ("bfloat16", 7, "BF16"),
        ("int8", 2, "INT8"),
        ("int32", 3, "INT32"),
        ("bool", 4, "BOOL"),
        ("uint8", 5, "UINT8"),
        ("int64", 8, "INT64"),
    ],
)
def test_torch_type(name: str, code: int, tensorrts: str) -> None:
    like_tensorrt = SimpleNamespace(name=tensorrts)  # an enumeration that is neither int nor str
    for form in (name, code, like_tensorrt, DataType[tensorrts]):
        assert torch_type(form) is getattr(torch, name)


@pytest.mark.parametrize(
    "form",
    [
        *("float8_e4m3fn", "int4", "float4_e2m1fn", "float64", "nonsense", ""),
        *(6, 9, 10, 11, 99, -1, None, True, 1.0),
        *(SimpleNamespace(name="FP8"), SimpleNamespace(name="INT4"), SimpleNamespace(name="FP4"), DataType.FP8),
    ],
)
def test_types_that_torch_lacks(form: Any) -> None:
    with pytest.raises(TypeError, match="Could not resolve TensorRT datatype to an equivalent PyTorch datatype"):
        torch_type(form)


# Calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positional", range(6))
def test_by_position_and_by_name(load: Any, positional: int) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    names = list(inputs)
    first = [inputs[n] for n in names[:positional]]
    rest = {n: inputs[n] for n in reversed(names[positional:])}
    for call in (engine, engine.forward):
        out = call(*first, **rest)
        assert list(out) == ["output"]
        assert is_right(out["output"], inputs)


def test_names_that_are_no_inputs_are_dropped(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    assert is_right(engine(**inputs, encoder_attention_mask=None, nonsense=torch.zeros(1))["output"], inputs)


def test_return_list(load: Any) -> None:
    program = fakes.copy_of("float32", [2], n=3)
    engine = load(program)
    tensors = [torch.full((2,), float(i), device="cuda") for i in range(3)]
    out = engine(*tensors, return_list=True)
    assert isinstance(out, list)
    assert [y[0].item() for y in out] == [0, 1, 2]
    assert list(engine(*tensors)) == [name for name, _, _ in engine.out_meta] == ["y0", "y1", "y2"]
    assert isinstance(engine(*tensors, return_list=False), dict)


def test_results_are_torchs_on_the_engines_device(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    y = engine(**inputs)["output"]
    assert type(y) is torch.Tensor
    assert (y.device, y.dtype, tuple(y.shape)) == (torch.device("cuda:0"), torch.bfloat16, (1, 41, 64))
    assert y.is_contiguous()
    assert not y.requires_grad


def test_results_stay_valid(load: Any) -> None:
    """No two results share memory while both are held, in whatever order they go."""
    engine = load()
    set_shapes(engine)
    rng = np.random.default_rng(0)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i in range(40):
        inputs = dit_inputs(seed=i)
        held.append((engine(**inputs)["output"], expected(inputs)))
        if rng.random() < 0.4:
            held.pop(rng.integers(len(held)))
        assert len({y.data_ptr() for y, _ in held}) == len(held)
    assert len(held) > 10
    for y, wanted in held:
        assert torch.equal(y.cpu(), wanted)


# Checks ---------------------------------------------------------------------------------------------------------------

WRONG = {
    "a list": (lambda x: [1.0], "Unsupported tensor{n} type: <class 'list'>"),
    "numpy": (lambda x: np.zeros(1), "Unsupported tensor{n} type: <class 'numpy.ndarray'>"),
    "None": (lambda x: None, "Unsupported tensor{n} type: <class 'NoneType'>"),
    "the host": (lambda x: x.cpu(), "Invalid tensor{n} device, expected device is cuda, but got cpu"),
    "a float": (
        lambda x: x.float(),
        "Invalid tensor{n} dtype, expected dtype is torch.bfloat16, but got torch.float32",
    ),
    "half": (lambda x: x.half(), "Invalid tensor{n} dtype, expected dtype is torch.bfloat16, but got torch.float16"),
    "a row less": (lambda x: x[:, 1:], "Invalid input{s}"),
    "rank": (lambda x: x[0], "Invalid input{s}"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("by_name", [False, True])
def test_what_is_refused(load: Any, wrong: str, by_name: bool) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    make, beginning = WRONG[wrong]
    inputs["sa_embs"] = make(inputs["sa_embs"])
    found = tuple(getattr(inputs["sa_embs"], "shape", ()))
    expectation = {
        False: {"n": "", "s": f" shape: (1, 41, 64) != {found}"},
        True: {"n": "[sa_embs]", "s": f"[sa_embs] shape: {found}, but the expected shape is: (1, 41, 64)"},
    }
    rig.trt().reset()
    with pytest.raises(AssertionError) as caught:
        engine(**inputs) if by_name else engine(*inputs.values())
    assert str(caught.value).startswith(beginning.format(**expectation[by_name]))
    assert isinstance(caught.value, errors.InputError)
    assert caught.value.tensor == "sa_embs"
    assert "sa_embs" in str(caught.value)
    assert engine.core.stats["calls"] == 0
    assert pickle.loads(pickle.dumps(caught.value)).tensor == "sa_embs"


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16, torch.bool])
def test_no_timestep_is_ever_reinterpreted(load: Any, dtype: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    inputs["timestep"] = inputs["timestep"].to(dtype)
    with pytest.raises(AssertionError, match=r"tensor\[timestep\] dtype, expected dtype is torch.int64"):
        engine(**inputs)


@pytest.mark.parametrize("absent", ["sa_embs", "timestep", "backbone_attention_mask"])
def test_a_missing_input_is_refused_before_anything_runs(load: Any, absent: str) -> None:
    """The scripts' class runs on a stale address first and counts afterwards."""
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    del inputs[absent]
    rig.trt().reset()
    beginning = "Invalid input tensors. The expected I/O tensors are 6, but got 5: "
    with pytest.raises(AssertionError, match=rf"^{beginning}missing: {absent}; not inputs: typo\."):
        engine(**inputs, typo=1)
    assert engine.core.stats["calls"] == 0
    assert torch._standin.counts["allocations"] == 5


def test_an_input_twice(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    with pytest.raises(AssertionError, match=r"^Invalid input tensors.*'sa_embs' came by position and by name"):
        engine(inputs["sa_embs"], **inputs)


def test_too_many_by_position(load: Any) -> None:
    with pytest.raises(IndexError, match="found 2 positional inputs; allowed: 1: x"):
        load("mlp")(torch.zeros(1, 64, device="cuda"), torch.zeros(1, 64, device="cuda"))


def test_strided_inputs_are_copied_once_on_the_stream(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    wide = torch.zeros(1, 41, 128, dtype=torch.bfloat16, device="cuda")
    wide[:, :, ::2] = inputs["sa_embs"]
    strided = {
        **inputs,
        "sa_embs": wide[:, :, ::2],
        "vl_embs": inputs["vl_embs"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert not strided["vl_embs"].is_contiguous()
    assert is_right(engine(**strided)["output"], inputs)
    assert engine.core.stats["strided_copies"] == 2


def test_expanded_inputs(load: Any) -> None:
    engine, x = load("add"), torch.arange(8, device="cuda", dtype=torch.float32)
    for name in "ab":
        engine.set_runtime_tensor_shape(name, (4, 8))
    y = engine(x.expand(4, 8), x.expand(4, 8))["y"]
    assert torch.equal(y, (x + x).expand(4, 8))


def test_a_view_that_starts_anywhere(load: Any) -> None:
    """TensorRT wants addresses that 256 divides; a slice has what address it has."""
    engine, x = load("add"), torch.arange(80, device="cuda", dtype=torch.float32)
    for name in "ab":
        engine.set_runtime_tensor_shape(name, (1, 8))
    for start in (0, 1, 3, 64):
        view = x[start : start + 8].unsqueeze(0)
        assert torch.equal(engine(view, view)["y"], view * 2)


def test_shape_tensors_come_from_the_host(load: Any) -> None:
    engine = load("shape_input")
    x, size = torch.arange(4, device="cuda", dtype=torch.float32), torch.tensor([2, 3])
    assert tuple(engine(x, size)["y"].shape) == (2, 3)


# Execution ------------------------------------------------------------------------------------------------------------


def test_neither_wait_nor_fill_nor_allocation(load: Any) -> None:
    """The scripts' class waits for the stream and fills its outputs with zeros in every call."""
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    for _ in range(3):
        engine(**inputs)
    torch._standin.counts.clear()
    rig.cuda().reset()
    for _ in range(10):
        engine(**inputs)
    assert torch._standin.counts == {}
    for name in (
        "cuStreamSynchronize",
        "cuEventSynchronize",
        "cuMemsetD8Async",
        "cuMemAlloc_v2",
        "cuMemcpyDtoDAsync_v2",
    ):
        assert rig.cuda().count(name) == 0, name
    assert engine.core.stats["waits"] == 0


def test_a_result_is_there_when_the_stream_has_got_to_it(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    size = 41 * 64 * 2
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y = engine(**inputs)["output"]
    assert ctypes.string_at(y.data_ptr(), size) == b"\xcd" * size
    side.synchronize()
    now = np.frombuffer(ctypes.string_at(y.data_ptr(), size), np.uint16)
    assert np.array_equal(now, expected(inputs).view(torch.uint16).numpy().ravel())


@pytest.mark.parametrize("how", ["call", "constructor", "environment"])
def test_waiting_as_the_scripts_class_does(load: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("JETRT_TRT_SYNCHRONIZE", "1")
    engine, inputs = load(**({"synchronize": True} if how == "constructor" else {})), dit_inputs()
    set_shapes(engine)
    y = engine(**inputs, **({"synchronize": True} if how == "call" else {}))["output"]
    now = np.frombuffer(ctypes.string_at(y.data_ptr(), y.nbytes), np.uint16)
    assert np.array_equal(now, expected(inputs).view(torch.uint16).numpy().ravel())
    assert engine.core.stats["waits"] == 1
    engine(**inputs, synchronize=False)
    assert engine.core.stats["waits"] == 1


@pytest.mark.parametrize(("value", "waits"), [("", False), ("0", False), ("1", True), ("yes", True)])
def test_the_environments_switch(load: Any, monkeypatch: pytest.MonkeyPatch, value: str, waits: bool) -> None:
    monkeypatch.setenv("JETRT_TRT_SYNCHRONIZE", value)
    assert load("mlp").synchronize is waits
    assert load("mlp", synchronize=not waits).synchronize is not waits


def test_on_the_callers_current_stream(load: Any) -> None:
    engine = load()
    set_shapes(engine)
    side = torch.cuda.Stream()
    source = {k: v.clone() for k, v in dit_inputs().items()}
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        inputs = {k: v.clone() for k, v in source.items()}  # written by this stream alone
        y = engine(**inputs)["output"]
        inputs["sa_embs"].zero_()  # behind the engine, which has read them
        doubled = y * 2
    side.synchronize()
    assert is_right(y, source)
    assert torch.equal(doubled.float().cpu(), (expected(source) * 2).float())


@pytest.mark.parametrize("stream", ["default", "side"])
def test_two_engines_in_a_row(load: Any, stream: str) -> None:
    """The second reads what the first has just been told to write, with nothing of torch between them."""
    second, first = load(), load()
    for engine in (first, second):
        set_shapes(engine)
    with torch.cuda.stream(torch.cuda.Stream() if stream == "side" else torch.cuda.default_stream()):
        for seed in range(3):
            inputs = dit_inputs(seed=seed)
            middle = {**inputs, "sa_embs": expected(inputs)}
            torch.cuda.current_stream().synchronize()
            y = second(**{**inputs, "sa_embs": first(**inputs)["output"]})["output"]
            assert is_right(y, middle)


def test_a_failing_enqueue_is_an_error(load: Any) -> None:
    """The scripts' class ignores the return code and hands out zeros."""
    engine, inputs = load(fields={"fail": "enqueue"}), dit_inputs()
    set_shapes(engine)
    with pytest.raises(errors.InferenceError):
        engine(**inputs)


def test_gradients_end_here(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    wanted = expected(inputs)
    inputs["sa_embs"].requires_grad_()
    inputs["vl_embs"] = torch.nn.Parameter(inputs["vl_embs"])
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            y = engine(**inputs)["output"]
        assert not y.requires_grad
        assert torch.equal(y.cpu(), wanted)


def test_inference_mode(load: Any) -> None:
    engine = load()
    set_shapes(engine)
    with torch.inference_mode():
        inside = dit_inputs()
        y = engine(**inside)["output"]
        assert is_right(y * 1, inside)
    z = engine(**inside)["output"]  # inference tensors outside of it
    assert torch.equal(y, z)
    z += 1  # made outside: an ordinary tensor


def test_deterministic_mode_fills_nothing(load: Any) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    torch._standin.counts.clear()
    y = engine(**inputs)["output"]
    assert torch._standin.counts == {}
    assert is_right(y, inputs)


def test_inside_the_callers_graph(load: Any) -> None:
    """What a whole-loop graph is made of: enqueued plainly, replayed with new inputs."""
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = engine(**inputs)["output"] * 1
    for seed in (1, 2):
        fresh = dit_inputs(seed=seed)
        for name, x in fresh.items():
            inputs[name].copy_(x)
        graph.replay()
        assert is_right(y, fresh)
    graph.reset()


@pytest.mark.parametrize("cls", [Engine, GraphSafeEngine])
def test_a_loop_as_one_graph(load: Any, cls: type) -> None:
    """`jetrt.graph` over a function that says the shapes and calls the engine, as the scripts' loops do."""
    engine = load(cls=cls)

    def loop(**given: torch.Tensor) -> torch.Tensor:
        actions = given["sa_embs"]
        for step in range(4):
            for name, x in given.items():
                engine.set_runtime_tensor_shape(name, x.shape)
            timestep = torch.full((1,), step, dtype=torch.int64, device="cuda")
            actions = actions + engine(**{**given, "sa_embs": actions, "timestep": timestep})["output"] * 0.25
        return actions

    with graph(loop, dit_inputs()) as captured:
        captured.prepare(dit_inputs(S + 3))
        enqueued = rig.trt().count("enqueueV3")
        found = [captured(**dit_inputs(S + 3 * (seed % 2), seed)) for seed in range(4)]
        assert rig.trt().count("enqueueV3") == enqueued
        assert (captured.stats["replays"], captured.stats["reasons"]) == (4, {})
    for seed, actions in enumerate(found):
        assert torch.equal(actions, loop(**dit_inputs(S + 3 * (seed % 2), seed)))


@pytest.mark.parametrize("setting", ["off", "auto"])
def test_the_cores_own_graphs(load: Any, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    if setting != "off":
        monkeypatch.setenv("JETRT_GRAPHS", setting)
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(6):
            assert is_right(engine(**inputs)["output"], dit_inputs())
    assert (engine.core.stats["replays"] > 0) is (setting == "auto")
    assert load("mlp", graphs="off").core.stats["replays"] == 0


def test_threads_share_an_engine(load: Any) -> None:
    engine = load()
    set_shapes(engine)

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(10):
                inputs = dit_inputs(seed=seed * 100 + i)
                assert is_right(engine(**inputs)["output"], inputs)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_two_devices(tmp_path: Path) -> None:
    """On torch's current device, as the scripts' class; a tensor of the other one is refused by name."""
    code = """
import sys, fakes, torch
from jetrt import errors
from jetrt.trt_torch import Engine
path = fakes.write_plan(sys.argv[1])
with torch.cuda.device(1):
    engine = Engine(path)
    engine.set_runtime_tensor_shape("x", (2, 64))
assert torch.cuda.current_device() == 0
x = torch.randn(2, 64, device="cuda:1")
y = engine(x)["y"]
assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
import numpy as np
np.testing.assert_allclose(y.cpu().numpy(), fakes.mlp_reference(x.cpu().numpy()), rtol=1e-5, atol=1e-5)
try:
    engine(x.to("cuda:0"))
except errors.DeviceError as error:
    print(error)
assert fakes.FakeCuda().errors() == []
"""
    done = fakes.run_python(code, str(tmp_path / "m.plan"), env={"FAKE_CUDA_DEVICES": 2})
    assert "'x'" in done.stdout.splitlines()[-1]
    assert "cuda:0" in done.stdout.splitlines()[-1]


# close ----------------------------------------------------------------------------------------------------------------


def test_close(load: Any) -> None:
    engine, inputs = load(), dit_inputs()
    set_shapes(engine)
    y = engine(**inputs)["output"]
    engine.close()
    engine.close()
    assert rig.trt().live("ICudaEngine") == rig.trt().live("IExecutionContext") == 0
    assert engine.handle is engine.execution_context is None
    assert is_right(y, inputs)  # what is held stays valid
    for call in (lambda: engine(**inputs), lambda: engine(*inputs.values()), lambda: set_shapes(engine)):
        with pytest.raises(errors.ClosedEngineError):
            call()
    assert "closed" in repr(engine)
    assert rig.trt().errors() == []  # the context went before its engine


def test_what_scripts_delete_may_be_deleted(load: Any) -> None:
    engine = load()
    del engine.execution_context
    del engine.handle


@pytest.mark.parametrize("way", exits.TRT_TORCH)
def test_the_interpreter_ends_in_any_order(plan: Any, way: str) -> None:
    exits.run(exits.TRT_TORCH[way], plan("mlp"))


def test_many_loads_leave_nothing(clean: None, plan: Any) -> None:
    path, x = plan("mlp"), torch.zeros(2, 64, device="cuda")
    before = rig.live()
    for i in range(30):
        engine = Engine(path)
        engine.set_runtime_tensor_shape("x", (2, 64))
        engine(x)
        if i % 2:
            engine.close()
        del engine
    gc.collect()
    rig.until(lambda: rig.live() == {**before, "module": rig.live()["module"]}, lambda: f"{before} {rig.live()}")


# Subclasses -----------------------------------------------------------------------------------------------------------


def test_subclass(load: Any) -> None:
    seen: list[str] = []

    class Mine(Engine):
        def __init__(self, file: Any, plugins: Any = ()) -> None:
            super().__init__(file, plugins)
            seen.append("made")

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("forward")
            return super().forward(*args, **kwargs)

        def print(self) -> None:
            seen.append("print")

    engine = load(cls=Mine)
    set_shapes(engine)
    inputs = dit_inputs()
    assert is_right(engine(**inputs)["output"], inputs)
    assert seen == ["print", "made", "forward"]


def test_a_subclass_that_brings_its_own_core(load: Any, plan: Any) -> None:
    core = jetrt.Engine(plan("mlp"), graphs="off", on_strided="copy")

    class Loaded(Engine):
        def _open(self, file: Any) -> Any:
            return core

    engine = load("mlp", cls=Loaded)
    assert engine.core is core
    engine.set_runtime_tensor_shape("x", (1, 64))
    assert tuple(engine(torch.zeros(1, 64, device="cuda"))["y"].shape) == (1, 10)


# GraphSafeEngine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def safe(load: Any) -> Any:
    return lambda program="dit5", cls=GraphSafeEngine, **options: load(program, cls=cls, **options)


def test_cached_outputs_keep_their_address(safe: Any) -> None:
    engine = safe()
    seen = set()
    for length in (S, S + 1, S):
        set_shapes(engine, length)
        for seed in (0, 1):
            inputs = dit_inputs(length, seed)
            y = engine(**inputs)["output"]
            seen.add(y.data_ptr())
            assert is_right(y, inputs)
    assert len(seen) == 1
    inputs = dit_inputs()
    assert engine(**inputs)["output"] is engine(**inputs, cache_outputs=True)["output"]


def test_cached_outputs_cost_neither_wait_nor_fill_nor_copy(safe: Any) -> None:
    engine, inputs = safe(), dit_inputs()
    set_shapes(engine)
    engine(**inputs)
    torch._standin.counts.clear()
    for _ in range(3):
        engine(**inputs)
    assert torch._standin.counts == {}
    assert engine.core.stats["waits"] == 0


def test_uncached_outputs_stay_valid(safe: Any) -> None:
    engine = safe()
    set_shapes(engine)
    pairs = [(dit_inputs(seed=i), i) for i in range(3)]
    results = [engine(**inputs, cache_outputs=False)["output"] for inputs, _ in pairs]
    for y, (inputs, _) in zip(results, pairs, strict=True):
        assert is_right(y, inputs)


def test_cached_outputs_of_dynamic_shape(safe: Any) -> None:
    engine = safe("mlp")
    places: dict[int, set[int]] = {}
    for rows in (2, 5, 2, 5, 2):
        engine.set_runtime_tensor_shape("x", (rows, 64))
        x = torch.randn(rows, 64, device="cuda")
        y = engine(x)["y"]
        assert tuple(y.shape) == (rows, 10)
        np.testing.assert_allclose(y.cpu().numpy(), fakes.mlp_reference(x.cpu().numpy()), rtol=1e-5, atol=1e-5)
        places.setdefault(rows, set()).add(y.data_ptr())
    assert [len(p) for p in places.values()] == [1, 1]
    assert not places[2] & places[5]


def test_outputs_whose_shape_depends_on_values(safe: Any) -> None:
    engine = safe("nonzero")
    engine.set_runtime_tensor_shape("x", (2, 4))
    for n in (3, 5, 0, 5, 3):
        x = torch.zeros(2, 4, device="cuda")
        x.view(8)[:n] = 1
        y = engine(x)["y"]
        assert np.array_equal(y.cpu().numpy(), fakes.nonzero_reference(x.cpu().numpy()))
    engine = safe("shape_input")
    x = torch.arange(4, device="cuda", dtype=torch.float32)
    for size in ([2, 3], [1, 4], [2, 3]):
        assert list(engine(x, torch.tensor(size))["y"].shape) == size


@pytest.mark.parametrize("dynamic", [False, True])
def test_graph_safe_waits_when_asked(safe: Any, dynamic: bool) -> None:
    engine = safe("mlp" if dynamic else fakes.copy_of("float32", [2, 64]))
    if dynamic:
        engine.set_runtime_tensor_shape("x", (2, 64))
    for _ in range(2):
        x = torch.randn(2, 64, device="cuda")
        host = x.cpu().numpy()
        y = engine(x, synchronize=True)["y"]
        now = np.frombuffer(ctypes.string_at(y.data_ptr(), y.nbytes), np.float32).reshape(y.shape)
        np.testing.assert_allclose(now, fakes.mlp_reference(host) if dynamic else host, rtol=1e-5, atol=1e-5)
    assert isinstance(engine(x, return_list=True), list)


def test_cached_outputs_inside_inference_mode_and_outside(safe: Any) -> None:
    engine = safe("mlp")
    engine.set_runtime_tensor_shape("x", (2, 64))
    with torch.inference_mode():
        x = torch.randn(2, 64, device="cuda")
        y = engine(x)["y"]
    first = y.clone()
    assert engine(x)["y"] is y
    y += 1  # an ordinary tensor
    assert torch.equal(engine(x)["y"], first)


def test_hooks(safe: Any) -> None:
    calls: list[Any] = []

    class Mine(GraphSafeEngine):
        def _get_output_tensor(self, name: str, shape: Any, dtype: Any, device: Any) -> Any:
            calls.append((name, shape, dtype, device))
            return mine[: shape[0]]

        def _bind_input(self, name: str, tensor: Any) -> Any:
            calls.append((name, tuple(tensor.shape)))
            return tensor * 2

    mine = torch.zeros(16, 8, device="cuda")
    engine = safe("add", cls=Mine)
    a = torch.randn(4, 8, device="cuda")
    for name in "ab":
        engine.set_runtime_tensor_shape(name, (4, 8))
    device = torch.device("cuda:0")
    for _ in range(2):
        calls.clear()
        y = engine(a, a)["y"]
        assert calls == [("a", (4, 8)), ("b", (4, 8)), ("y", (4, 8), torch.float32, device)]
        assert y.data_ptr() == mine.data_ptr()
        assert torch.equal(y, a * 4)
    calls.clear()
    z = engine(a, a, cache_outputs=False)["y"]
    assert [c[0] for c in calls] == ["a", "b"]
    assert z.data_ptr() != mine.data_ptr()


def test_a_hook_that_returns_the_wrong_tensor(safe: Any) -> None:
    class Mine(GraphSafeEngine):
        def _get_output_tensor(self, name: str, shape: Any, dtype: Any, device: Any) -> Any:
            return torch.zeros(shape, device=device)  # float32 for bfloat16

    engine = safe(cls=Mine)
    set_shapes(engine)
    with pytest.raises(errors.DTypeError, match=r"'output'.*found float32; allowed: bfloat16"):
        engine(**dit_inputs())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda i: i | {"sa_embs": [1]}, TypeError, "Unsupported tensor"),
        (lambda i: i | {"sa_embs": i["sa_embs"].float()}, TypeError, "Invalid tensor.sa_embs. dtype"),
        (lambda i: i | {"sa_embs": i["sa_embs"][:, :3]}, ValueError, "Invalid input.sa_embs. shape"),
        (lambda i: i | {"sa_embs": i["sa_embs"].cpu()}, ValueError, "Invalid tensor.sa_embs. device"),
        (lambda i: {k: v for k, v in i.items() if k != "timestep"}, TypeError, "missing: timestep"),
    ],
)
def test_graph_safe_errors_are_no_assertions(safe: Any, change: Any, error: type, text: str) -> None:
    engine = safe()
    set_shapes(engine)
    with pytest.raises(error, match=text) as caught:
        engine(**change(dit_inputs()))
    assert not isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, errors.InputError)
    assert not isinstance(caught.value, EngineAssertionError)


def test_graph_safe_refuses_a_shape_at_once(safe: Any) -> None:
    engine = safe()
    with pytest.raises(ValueError, match=r"'vl_embs': found \[1, 999, 64\]; allowed: \[1, 1, 64\] to"):
        engine.set_runtime_tensor_shape("vl_embs", (1, 999, 64))


def test_a_closed_graph_safe_engine(safe: Any) -> None:
    engine, inputs = safe(), dit_inputs()
    set_shapes(engine)
    y = engine(**inputs)["output"]
    assert engine._closed is False
    engine.close()
    engine.close()
    assert engine._closed is True
    with pytest.raises(RuntimeError, match="closed") as caught:
        engine(**inputs)
    assert isinstance(caught.value, errors.ClosedEngineError)
    assert is_right(y, inputs)


def test_a_graph_over_graph_safe_engines(safe: Any) -> None:
    """Two engines and torch between them; cached outputs are the graph's own, at one address."""
    first, second = safe("mlp"), safe(fakes.copy_of("float32", [2, 10]))
    first.set_runtime_tensor_shape("x", (2, 64))
    x = torch.randn(2, 64, device="cuda")
    warm = first(x)["y"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = second(first(x)["y"] + 1)["y"]
        y = y * 2
    place = first(x)["y"].data_ptr()
    assert place == warm.data_ptr()
    for _ in range(3):
        x.copy_(torch.randn(2, 64, device="cuda"))
        graph.replay()
        wanted = (fakes.mlp_reference(x.cpu().numpy()) + 1) * 2
        np.testing.assert_allclose(y.cpu().numpy(), wanted, rtol=1e-5, atol=1e-5)
    graph.reset()


# Imports --------------------------------------------------------------------------------------------------------------


def test_jetrt_alone_imports_neither() -> None:
    code = "import sys, jetrt; print([n for n in ('torch', 'jetrt.trt_torch', 'jetrt.lookalikes') if n in sys.modules])"
    assert fakes.run_python(code).stdout.strip() == "[]"


def test_as_the_module_that_scripts_import() -> None:
    """`trt_model_forward.py` says `import trt_torch` and takes `Engine` and `torch_type` from it."""
    code = """
import sys
import jetrt.trt_torch
sys.modules["trt_torch"] = jetrt.trt_torch
from trt_torch import Engine, torch_type
import trt_torch
assert trt_torch.Engine is Engine is jetrt.trt_torch.Engine
assert "tensorrt" not in sys.modules
print("yes")
"""
    assert fakes.run_python(code).stdout.strip() == "yes"
