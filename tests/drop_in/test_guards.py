"""What `jetrt.graph` and `jetrt.groot.optimize` ask before each launch: `_core._Guards` and `_core._Unchanged`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from jetrt import _core

MODES = (False, None)


def table(*calls: tuple[tuple[Any, ...], dict[str, Any]], gradient_free: bool = True) -> _core._Guards:
    guards = _core._Guards()
    for number, (args, kwargs) in enumerate(calls):
        assert guards.add(args, kwargs, MODES, gradient_free, number)
    return guards


def found(guards: _core._Guards, *args: Any, modes: Any = MODES, recording: bool = False, **kwargs: Any) -> Any:
    one = guards.find(args, kwargs, modes, recording)
    return None if one is None else one[0]


def cuda(*shape: int, dtype: Any = None) -> Any:
    return torch.zeros(shape, dtype=dtype or torch.float32, device="cuda")


def test_tensors_come_back_by_position_then_by_name() -> None:
    x, y, z = cuda(2), cuda(3), cuda(4)
    guards = table(((x, 7), {"b": z, "a": y, "n": None}))
    again = (cuda(2), cuda(3), cuda(4))
    value, tensors = guards.find((again[0], 7), {"n": None, "b": again[2], "a": again[1]}, MODES, False) or (None, [])
    assert value == 0
    assert [t is a for t, a in zip(tensors, again, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    "other",
    [
        lambda: cuda(2, 4),
        lambda: cuda(3, 2),
        lambda: cuda(2, 3, 1),
        lambda: cuda(2, 3, dtype=torch.float16),
        lambda: cuda(2, 3, dtype=torch.int32),
        lambda: torch.zeros((2, 3)),
        lambda: cuda(3, 2).t(),
        lambda: cuda(2, 4)[:, :3],
        lambda: None,
        lambda: 1,
        lambda: torch.nn.Parameter(cuda(2, 3)),
    ],
)
def test_another_tensor_is_another_call(other: Any) -> None:
    guards = table(((cuda(2, 3),), {}), ((), {"x": cuda(2, 3)}))
    assert found(guards, cuda(2, 3)) == 0
    assert found(guards, x=cuda(2, 3)) == 1
    assert found(guards, other()) is None
    assert found(guards, x=other()) is None


def test_strides_belong_to_it() -> None:
    guards = table(((cuda(3, 2).t(),), {}))
    assert found(guards, cuda(3, 2).t()) == 0
    assert found(guards, cuda(2, 3)) is None
    assert found(guards, cuda(2, 4)[:, :3]) is None


def test_structure_belongs_to_it() -> None:
    x = cuda(2)
    guards = table(((x,), {}), ((x, x), {}), ((x,), {"y": x}))
    assert [found(guards, x), found(guards, x, x), found(guards, x, y=x)] == [0, 1, 2]
    assert found(guards) is None
    assert found(guards, x, z=x) is None
    assert found(guards, x, x, x) is None


@pytest.mark.parametrize(
    ("known", "other"),
    [(1, 2), (1, True), (1, 1.0), (0.0, -0.0), ("a", "b"), ("a", b"a"), (None, 0), (True, False), (10**30, 10**31)],
)
def test_plain_values_are_told_apart_by_type_and_value(known: Any, other: Any) -> None:
    guards = table(((known,), {}))
    assert found(guards, known) == 0
    assert found(guards, other) is None
    assert found(guards, int(str(known)) if type(known) is int else known) == 0  # equal, another object


def test_nan_is_like_nothing() -> None:
    nan = float("nan")
    assert found(table(((nan,), {})), nan) is None


def test_other_values_are_not_its_own() -> None:
    guards = _core._Guards()
    for value in ([1], (1,), {"a": 1}, object(), torch.float32, cuda):
        assert not guards.add((value,), {}, MODES, True, "it")
        assert not guards.add((), {"x": value}, MODES, True, "it")
    assert guards.find((), {}, MODES, False) is None
    assert guards.add((1,), {}, MODES, True, "it")
    assert guards.find(([1],), {}, MODES, False) is None


def test_modes_belong_to_it() -> None:
    guards = table(((1,), {}))
    assert found(guards, 1) == 0
    assert found(guards, 1, modes=(True, None)) is None
    assert found(guards, 1, modes=(False, torch.float16)) is None


def test_gradients() -> None:
    needs = cuda(2)
    needs.requires_grad = True
    free, other = table(((cuda(2),), {})), table(((cuda(2),), {}), gradient_free=False)
    assert found(free, cuda(2), recording=True) == 0
    assert found(free, needs, recording=True) is None
    assert found(free, needs) == 0
    assert found(other, cuda(2), recording=True) is None
    assert found(other, cuda(2)) == 0


def test_removed_ones_are_gone() -> None:
    guards = _core._Guards()
    first, second = object(), object()
    for value in (first, second):
        guards.add((1,), {}, MODES, True, value)
    assert found(guards, 1) is first
    guards.remove(first)
    assert found(guards, 1) is second
    guards.remove(second)
    guards.remove(second)
    assert found(guards, 1) is None


def test_changed_while_others_ask() -> None:
    guards, stop = table(((1,), {})), threading.Event()

    def change() -> None:
        while not stop.is_set():
            guards.add((2,), {}, MODES, True, change)
            guards.remove(change)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {found(guards, 1) for _ in range(5000)} == {0}
    finally:
        stop.set()
        thread.join()


# What is baked in -----------------------------------------------------------------------------------------------------


def test_the_first_place_that_changed() -> None:
    one, other = object(), object()
    weight = cuda(4)
    objects: dict[str, Any] = {"a": one, "n": None}
    tensors: dict[str, Any] = {"w": weight}
    hooks: dict[int, Any] = {}
    places = _core._Unchanged(
        [(objects, "a", one), (objects, "n", None), (objects, "absent", None)],
        [(tensors, "w", weight.data_ptr())],
        [hooks],
    )
    assert places.changed() is None
    objects["a"] = other
    assert places.changed() == 0
    objects["a"] = one
    objects["absent"] = other
    assert places.changed() == 2
    del objects["absent"], objects["n"]
    assert places.changed() is None
    tensors["w"] = cuda(4)
    assert places.changed() == 3
    tensors["w"] = None
    assert places.changed() == 3
    del tensors["w"]
    assert places.changed() == 3
    tensors["w"] = weight
    hooks[1] = print
    assert places.changed() == 4
    hooks.clear()
    assert places.changed() is None
