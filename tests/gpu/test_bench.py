"""`jetrt bench` where there is a GPU: the parts of a call, torch beside TensorRT, threads, and what is given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jetrt.bench
from jetrt.bench import _cuda
from jetrt.bench.results import Row

pytestmark = pytest.mark.gpu

QUICK = {"calls": 100, "seconds": 0.2, "max_seconds": 2.0}


def rows(what: Any, **options: Any) -> list[Row]:
    found: list[Row] = jetrt.bench.bench(what, timing=QUICK, **options).rows
    return found


@pytest.mark.parametrize("name", ["conv_fp16", "mlp", "dit5", "nonzero"])
@pytest.mark.parametrize("data", ["host", "device"])
def test_a_plan(engines: Path, name: str, data: str) -> None:
    (row,) = rows(engines / f"{name}.engine", data=data)
    assert row.status == "ok", row.reason
    assert row.end_to_end is not None
    parts = {"enqueue", "gpu"} | ({"h2d", "d2h"} if data == "host" else set())
    assert set(row.parts) == parts
    known = sum(row.parts[part].median for part in parts - {"enqueue"})
    # Events and the host's clock tell the same story: what the GPU did lies within the call.
    assert 0 < known <= row.end_to_end.median * 1.05
    assert row.memory["device_used"] is not None
    assert row.trtexec["10.x"].startswith("trtexec --loadEngine=")


def test_graphs_are_what_was_asked_for(engines: Path) -> None:
    (on,) = rows(engines / "mlp.engine", data="device", graphs="auto")
    (off,) = rows(engines / "mlp.engine", data="device", graphs="off")
    assert (on.graph, off.graph) == ("graph", "eager")


def test_threads_share_an_engine(engines: Path) -> None:
    found = rows(engines / "conv_fp16.engine", concurrency=[1, 4])
    assert [row.status for row in found] == ["ok", "ok"]
    assert found[1].end_to_end is not None
    assert found[1].end_to_end.calls >= 400


def test_a_row_gives_back_what_it_took(engines: Path) -> None:
    rows(engines / "conv_fp16.engine")
    free = _cuda.device(0).memory()[0]
    for _ in range(5):
        rows(engines / "conv_fp16.engine", concurrency=[2])
    assert free - _cuda.device(0).memory()[0] < 16 << 20  # other libraries keep a little


CODE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
    def forward(self, x):
        return self.layers(x)

def example_inputs(batch):
    return {"x": torch.randn(batch, 1024)}
"""


def test_a_torch_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CODE)
    text = f"{tmp_path}/net.py:Net"
    found = rows(text, runtimes=["pytorch_fp16"], precisions=["fp32", "fp16", "bf16"], batches=[1, 64])
    assert [row.status for row in found] == ["ok"] * 6, [row.reason for row in found]
    for row in found:
        assert set(row.parts) == {"enqueue", "h2d", "gpu", "d2h"}
        assert row.accuracy is not None
        assert row.accuracy["state"] == "passed", row.accuracy["reason"]


def test_the_files(engines: Path, tmp_path: Path) -> None:
    report = jetrt.bench.bench(engines / "mlp.engine", timing=QUICK, out=tmp_path / "out")
    data = json.loads(Path(report.files["json"]).read_text())
    assert data["complete"]
    row = data["rows"][0]
    assert row["settings"]["module_loading"] in ("eager", "lazy")
    if row["after"] is not None and row["after"]["gpu_temp_c"] is not None:
        assert 0 < row["after"]["gpu_temp_c"] < 120
