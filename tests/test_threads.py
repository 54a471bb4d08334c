"""Callers in several threads: results are right, one context is never used twice at once, and the GIL is free."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import rig

import fakes
from jetrt import errors

clean, load = map(pytest.fixture, (rig.clean, rig.load))
INPUTS = [np.random.default_rng(i).standard_normal((1 + i, 64)).astype(np.float32) for i in range(8)]


def together(n: int, work: Callable[[int], None]) -> None:
    """The stand-ins report a context that two threads use at once, so being right is not all that is checked."""
    start = threading.Barrier(n)

    def run(i: int) -> None:
        start.wait()
        work(i)

    with ThreadPoolExecutor(n) as pool:
        list(pool.map(run, range(n)))


@pytest.mark.parametrize("graphs", ["off", "auto"])
@pytest.mark.parametrize("contexts", [1, 3, 8])
def test_eight_threads(load: Callable[..., Any], contexts: int, graphs: str) -> None:
    engine = load("mlp", {"max_contexts": contexts, "graphs": graphs, "graph_bytes": 1 << 16})

    def work(i: int) -> None:
        for _ in range(30):
            np.testing.assert_allclose(engine(INPUTS[i])["y"], fakes.mlp_reference(INPUTS[i]), rtol=1e-5, atol=1e-5)

    together(8, work)
    assert engine.stats["calls"] == 240
    assert rig.trt().live("IExecutionContext") - engine.stats["graphs"] <= contexts


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_each_thread_its_stream(load: Callable[..., Any], graphs: str) -> None:
    engine = load("mlp", {"max_contexts": 2, "graphs": graphs})
    arrays = [rig.Array(x) for x in INPUTS[:4]]

    # The engine orders itself after streams that it has seen, so they outlive it.
    streams: list[int] = []

    def work(i: int) -> None:
        rig.enter()
        stream = rig.made("cuStreamCreate", 1)
        streams.append(stream)
        for _ in range(20):
            y = engine(arrays[i], stream=stream)["y"]
            np.testing.assert_allclose(rig.fetch(y, stream), fakes.mlp_reference(INPUTS[i]), rtol=1e-5, atol=1e-5)
            del y

    together(4, work)
    engine.close()
    rig.enter()
    for stream in streams:
        rig.ok("cuStreamDestroy_v2", stream)


def test_timeout_names_the_way_out(load: Callable[..., Any]) -> None:
    """With more threads than contexts and no patience some give up, by name, and the others are right."""
    engine = load("mlp", {"timeout": 0.0})
    gave_up: list[Exception] = []

    def work(i: int) -> None:
        for _ in range(50):
            try:
                y = engine(INPUTS[i])["y"]
            except errors.ContextTimeoutError as error:
                gave_up.append(error)
            else:
                np.testing.assert_allclose(y, fakes.mlp_reference(INPUTS[i]), rtol=1e-5, atol=1e-5)

    together(8, work)
    for error in gave_up:
        assert (error.seconds, error.max_contexts) == (0.0, 1)
        assert "Raise max_contexts" in str(error)
    assert engine.stats["calls"] + len(gave_up) == 400


def test_close_while_others_call(load: Callable[..., Any]) -> None:
    engine = load("mlp", {"max_contexts": 2})
    running = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            running.wait()
            engine.close()
            return
        try:
            while True:
                y = engine(INPUTS[i])["y"]
                running.set()
                np.testing.assert_allclose(y, fakes.mlp_reference(INPUTS[i]), rtol=1e-5, atol=1e-5)
        except errors.ClosedEngineError:
            pass

    together(4, work)
    assert engine.closed


def test_the_gil_is_free_during_a_call(load: Callable[..., Any]) -> None:
    """A thread counts while calls run that take a while (packing a large array on the host)."""
    program = fakes.copy_of("float32", [-1, -1], [([1, 1], [2, 2], [2000, 2000])])
    engine = load(program, {"on_strided": "copy", "graphs": "off"})
    slow = np.zeros((2000, 2000), np.float32).T
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.0005):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    advanced = 0
    try:
        for _ in range(10):
            before = ticks
            engine(slow)
            advanced += ticks > before
    finally:
        stop.set()
        thread.join()
    # In hardly any call where the GIL is held for its whole length: then only between two lines of this loop.
    assert advanced >= 8
