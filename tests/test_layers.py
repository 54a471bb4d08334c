"""`Engine.inspect` and `Engine.layer_times`: a look into a plan leaves the engine as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rig

import fakes
import jetrt

clean, load = map(pytest.fixture, (rig.clean, rig.load))


def test_layer_times(load: Callable[..., Any]) -> None:
    engine = load("mlp", {"graphs": "off"})
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    before = engine(x=x)["y"]
    for _ in range(2):
        times = engine.layer_times({"x": x}, runs=3)
        assert len(times) == 3
        assert all(isinstance(name, str) and ms >= 0 for run in times for name, ms in run)
        assert len({tuple(name for name, _ in run) for run in times}) == 1
    # The stream of the measuring context is known to the pool: results must still be made and reused afterwards.
    for _ in range(5):
        np.testing.assert_array_equal(engine(x=x)["y"], before)


def test_layer_times_of_a_callers_stream(load: Callable[..., Any]) -> None:
    engine = load("mlp", {"graphs": "off"})
    x = rig.Array(np.ones((8, 64), np.float32))
    with rig.new_stream() as stream:
        assert engine.layer_times({"x": x}, runs=1, stream=stream)
        engine.close()


def test_layer_times_needs_eager_calls(load: Callable[..., Any]) -> None:
    engine = load("mlp")
    with pytest.raises(ValueError, match='load the engine with graphs="off"'):
        engine.layer_times({"x": np.ones((8, 64), np.float32)})


def test_inspect(load: Callable[..., Any]) -> None:
    engine = load("mlp", {"graphs": "off"})
    assert json.loads(engine.inspect())["Layers"]
    assert json.loads(engine.inspect({"x": (8, 64)}))["Layers"]
    with pytest.raises(jetrt.errors.InferenceError, match="'x'"):
        engine.inspect({"x": (65, 64)})
    engine.close()
    with pytest.raises(jetrt.errors.ClosedEngineError):
        engine.inspect()


def test_layer_times_match_the_inspector(load: Callable[..., Any]) -> None:
    engine = load("mlp", {"graphs": "off"})
    x = np.ones((8, 64), np.float32)
    layers = json.loads(engine.inspect({"x": (8, 64)}))["Layers"]
    names = {layer if isinstance(layer, str) else layer["Name"] for layer in layers}
    assert {name for run in engine.layer_times({"x": x}, runs=1) for name, _ in run} <= names
    assert fakes.FakeTrt().errors() == []
