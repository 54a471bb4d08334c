"""What the table of known failures says travels in the exceptions of loads and runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fakes
import jetrt
from jetrt import errors

LAUNCH = "CUDA error 400 launching __myl_ReplMove kernel."


def test_a_run(tmp_path: Path) -> None:
    plan = fakes.write_plan(tmp_path / "a.engine", "mlp", fail=["enqueue"], run_log=[[1, LAUNCH]])
    with jetrt.Engine(plan, graphs="off") as engine, pytest.raises(errors.InferenceError) as caught:
        engine(x=np.ones((8, 64), np.float32))
    assert [finding.id for finding in caught.value.findings] == ["myelin-launch"]
    assert "Known failure 'myelin-launch'" in str(caught.value)
    assert "next step: " in str(caught.value)
    assert LAUNCH in caught.value.log


def test_a_load(tmp_path: Path) -> None:
    plan = fakes.write_plan(tmp_path / "a.engine", "mlp", host_code=True)
    with pytest.raises(errors.EngineDeserializeError) as caught:
        jetrt.Engine(plan)
    assert [finding.id for finding in caught.value.findings] == ["host-code"]


def test_an_error_that_is_none_of_them(tmp_path: Path) -> None:
    plan = fakes.write_plan(tmp_path / "a.engine", "mlp", fail=["enqueue"])
    with jetrt.Engine(plan, graphs="off") as engine, pytest.raises(errors.InferenceError) as caught:
        engine(x=np.ones((8, 64), np.float32))
    assert caught.value.findings == []
    assert "Known failure" not in str(caught.value)
