"""docs/runtimes.md tells the truth: its Python runs, its TOML is understood, what it names exists."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from jetrt.runtime import RUNTIMES
from jetrt.runtimes.config import VARIABLES, build_flag, read_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
MINE = PAGE.split("\n## Temper")[0]  # the runtimes' part


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder holds the model that the page speaks of: y = x + x, float32 [N,64]."""
    import onnx_models  # skips where there is no onnxruntime

    f32 = onnx_models.F32
    nodes, x, y = [("Add", ["x", "x"], ["y"], {})], [("x", f32, ["N", 64])], [("y", f32, ["N", 64])]
    onnx_models.save(tmp_path / "model.onnx", nodes, x, y)
    monkeypatch.chdir(tmp_path)
    for variable in list(os.environ):
        if variable.startswith(("JETRT_RUNTIME", "BUILD_")):
            monkeypatch.delenv(variable)
    return tmp_path


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", MINE, re.S))
def test_python_runs(code, folder):
    if "import torch" in code:
        pytest.importorskip("torch", reason="torch is not installed")
    exec(compile(code, "docs/runtimes.md", "exec"), {})


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", MINE, re.S))
def test_toml_is_understood(text, tmp_path):
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli", reason="Python 3.10 reads TOML by the package tomli")
    (tmp_path / "robot.toml").write_text(text)
    found = read_config(tmp_path / "robot.toml")
    assert found.name == "tensorrt"
    assert found.build.precision == "fp16"


def test_every_runtime_flag_and_variable_is_there():
    for name in RUNTIMES:
        assert f"| `{name}` |" in MINE
        assert f"`{build_flag(name)}`" in MINE
    for variable in VARIABLES:
        assert variable.removeprefix("JETRT_RUNTIME") in MINE


def test_files_exist():
    for path in re.findall(r"`((?:benches|docs|tests)/[\w./-]+)`", MINE):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)\s#]+)", MINE):
        assert (ROOT / "docs" / target).exists(), target
