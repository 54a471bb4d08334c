"""`jetrt bench` on torch modules and on callables that use torch, on the CPU. Skipped without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import jetrt.bench as package  # noqa: E402
from jetrt.bench.results import Row  # noqa: E402

# torch warns of its own plans with TorchScript, and of a driver that it cannot use.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:CUDA initialization.*:UserWarning"),
]

CODE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)
        self.drop = torch.nn.Dropout(0.5)
    def forward(self, x, scale=1.0):
        return {"y": self.drop(self.linear(x)) * scale}

class Nan(Net):
    def forward(self, x):
        return self.linear(x) * float("nan")

class Fixed(Net):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.eval()

ready = Net()
seen = []

def double(x):
    seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    return torch.as_tensor(x) @ torch.as_tensor(x).T

def example_inputs(batch):
    return {"x": torch.ones(batch, 8)}

class Noisy(Fixed):
    def example_inputs(self, batch):
        return {"x": torch.randn(batch, 8)}

class One(Fixed):
    example_inputs = {"x": torch.ones(1, 8)}
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(CODE)
    return str(path)


def rows(what: Any, **options: Any) -> list[Row]:
    timing = {"calls": 20, "seconds": 0, "max_seconds": 0.2}
    found: list[Row] = package.bench(what, device="cpu", timing=timing, **options).rows
    return found


def test_a_module_of_a_file(code: str) -> None:
    (row,) = rows(f"{code}:Net", runtimes=["pytorch_fp16"], autocast_dtype="float32")
    assert (row.status, row.reason, row.precision, row.batch, row.imgsz) == ("ok", "", "fp32", 1, "8")
    assert row.notes == ["the module came in training mode and was set to eval mode"]
    assert row.parts == {}  # a CPU has no events
    assert row.accuracy is not None
    assert (row.accuracy["state"], row.accuracy["reference"]) == ("passed", "the module in fp32 on cpu")
    assert "torch.backends.cuda.matmul.allow_tf32" in row.settings


def test_precisions_and_batches_of_a_module(code: str) -> None:
    found = rows(f"{code}:Net", runtimes=["pytorch_fp16"], precisions=["fp32", "bf16", "int8"], batches=[1, 3])
    assert [(row.precision, row.batch, row.status) for row in found] == [
        ("fp32", 1, "ok"),
        ("fp32", 3, "ok"),
        ("bf16", 1, "ok"),
        ("bf16", 3, "ok"),
    ]
    assert found[2].accuracy is not None
    assert found[2].accuracy["max_abs"] > 0  # it was computed in bfloat16
    (row,) = rows(f"{code}:Net", runtimes=["pytorch_fp16"], precisions=["int8"])
    assert (row.status, row.reason) == ("skipped", "pytorch_fp16 has no precision int8; it has fp32, fp16, bf16")


def test_autocast_is_float16_unless_said_otherwise(code: str) -> None:
    (row,) = rows(f"{code}:Net", runtimes=["pytorch_fp16"])
    assert row.precision == "fp16"


def test_a_module_of_the_caller_is_not_changed(code: str) -> None:
    from jetrt.bench.subjects import subject

    module = subject(f"{code}:ready").target
    (row,) = rows({"net": module}, runtimes=["pytorch_fp16"], shapes={"x": ((2, 8), None)}, autocast_dtype="float32")
    assert row.status == "failed"
    assert "the module is in training mode" in row.reason
    assert module.training
    (row,) = rows(
        {"net": module.eval()}, runtimes=["pytorch_fp16"], shapes={"x": ((2, 8), None)}, autocast_dtype="float32"
    )
    assert (row.status, row.batch) == ("ok", 2)


def test_a_module_without_inputs_says_what_to_give(code: str) -> None:
    from jetrt.bench.subjects import subject

    module = subject(f"{code}:ready").target.eval()
    (row,) = rows({"net": module}, runtimes=["pytorch_fp16"])
    assert row.status == "failed"
    assert row.reason == (
        "BenchOptionError: net: a torch module does not say what its inputs are. Its forward takes x. Give "
        "--shape x=1x3x224x224 for each, or an example_inputs beside it."
    )


def test_inputs_of_a_file_go_before_those_of_the_module(code: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((3, 8), np.float32))
    np.savez(tmp_path / "other.npz", image=np.ones((5, 8), np.float32))
    np.savez(tmp_path / "y.npz", y=subject_of(code)(torch.ones(1, 8))["y"].detach().numpy())
    options = {"runtimes": ["pytorch_fp16"], "autocast_dtype": "float32"}
    (row,) = rows(f"{code}:Fixed", inputs=tmp_path / "x.npz", **options)
    assert (row.status, row.batch) == ("ok", 3)
    # A file without its inputs leaves it those that it brought, not random ones.
    (row,) = rows(f"{code}:Fixed", inputs=tmp_path / "other.npz", reference=tmp_path / "y.npz", **options)
    assert (row.status, row.batch) == ("ok", 1)
    assert row.accuracy is not None
    assert row.accuracy["max_abs"] == 0


def subject_of(code: str) -> Any:
    from jetrt.bench.subjects import subject

    return subject(f"{code}:Fixed").target


def test_the_reference_computes_on_the_inputs_of_the_row(code: str) -> None:
    options = {"runtimes": ["pytorch_fp16"], "autocast_dtype": "float32"}
    (row,) = rows(f"{code}:Noisy", **options)  # whose example_inputs are others each time
    assert row.accuracy is not None
    assert (row.accuracy["state"], row.accuracy["max_abs"]) == ("passed", 0)

    # The first dimension of one input is no batch of the other.
    class Two(torch.nn.Module):
        def forward(self, x: Any, table: Any) -> Any:
            return x.sum() + table.sum()

    (row,) = rows(Two().eval(), shapes={"x": ((2, 8), None), "table": ((5, 8), None)}, **options)
    assert row.accuracy is not None
    assert (row.accuracy["state"], row.accuracy["max_abs"]) == ("passed", 0)


def test_a_batch_that_the_inputs_of_a_module_do_not_have_is_no_row(code: str) -> None:
    one, four = rows(f"{code}:One", runtimes=["pytorch_fp16"], autocast_dtype="float32", batches=[1, 4])
    assert (one.status, one.batch) == ("ok", 1)
    assert (four.status, four.batch) == ("skipped", 4)
    assert four.reason.startswith("--batch 4: no input of One has that first dimension (x [1, 8]).")


def test_a_callable_of_torch_has_a_row_for_each_precision(code: str) -> None:
    found = rows(f"{code}:double", precisions=["fp32", "bf16", "int8"])
    assert [(row.precision, row.status) for row in found] == [("fp32", "ok"), ("bf16", "ok")]


def test_torchscript_and_torch_export(code: str, tmp_path: Path) -> None:
    from jetrt.bench.subjects import subject

    class Plain(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2

    torch.jit.trace(Plain().eval(), torch.ones(2, 8)).save(str(tmp_path / "m.ts"))
    torch.export.save(torch.export.export(Plain().eval(), (torch.ones(2, 8),)), tmp_path / "m.pt2")
    for name in ("m.ts", "m.pt2"):
        assert subject(str(tmp_path / name)).kind == "torch"
        (row,) = rows(
            str(tmp_path / name), runtimes=["pytorch_fp16"], shapes={"x": ((2, 8), None)}, autocast_dtype="float32"
        )
        assert (row.status, row.reason) == ("ok", "")


def test_a_module_whose_results_hold_nan(code: str) -> None:
    (row,) = rows(f"{code}:Nan", runtimes=["pytorch_fp16"], autocast_dtype="float32")
    assert row.status == "nan"


def test_a_callable_has_the_same_autocast_in_its_first_call(code: str) -> None:
    import sys

    (row,) = rows(f"{code}:double", autocast_dtype="bfloat16")
    seen = sys.modules["jetrt_bench_net"].seen
    assert row.precision == "bf16"
    assert set(seen) == {(True, torch.bfloat16)}
    seen.clear()
    (row,) = rows(f"{code}:double", autocast_dtype="float32")
    assert row.precision == "fp32"
    assert {on for on, _ in sys.modules["jetrt_bench_net"].seen} == {False}


def test_missing_torch_tensorrt_is_skipped(code: str) -> None:
    pytest.importorskip("torch")
    try:
        import torch_tensorrt  # noqa: F401
    except ImportError:
        (row,) = rows(f"{code}:Net", runtimes=["torch_tensorrt"])
        assert row.status == "skipped"
        assert "Missing: the package torch_tensorrt" in row.reason
