"""The inputs that a plan is tried with: min, opt and max of every profile."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import BuildOptionError
from ..report import dims
from .arrays import Array, dtype_name, keys_for, pick, to_bfloat16

if TYPE_CHECKING:
    from .profiles import NetworkInput, Profile

__all__ = ["POINTS", "Case", "Point", "points"]

Point = Literal["min", "opt", "max"]
POINTS: tuple[Point, ...] = ("min", "opt", "max")


@dataclass(frozen=True)
class Case:
    """Inputs for one point of one profile; names in the model's order, arrays contiguous."""

    profile: int
    point: Point
    inputs: Mapping[str, Array]


def points(
    profiles: Sequence[Profile],
    inputs: Sequence[NetworkInput],
    *,
    given: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> list[Case]:
    """Inputs at min, opt and max of every profile; points of a profile that are alike are one case,
    unless the file has something for them by name.

    Shape tensors hold the profile's values. What `given` (an .npz file) has for an input is used as it is, where its
    shape is the shape of the point exactly; it may have one array for each point (`arrays.pick`). Other inputs are
    random and depend on seed, profile, point and name alone: floats are normal with deviation 1, 8-bit integers take
    every value, wider ones and bools are 0 and 1, which serve as ids, indices and masks alike. No row of those (along
    the last axis) is 0 everywhere: a mask that hides everything makes NaN of a softmax.

    Raises `BuildOptionError` for a given array that fits no input, or not every point.
    """
    given = given or {}
    names = [info.name for info in inputs]
    places = [(index, point) for index in range(len(profiles)) for point in POINTS]
    known = {key for name in names for place in places for key in keys_for(name, *place)}
    for key in given:
        if key not in known:
            raise _refused(
                f"{key!r} is for no input of the model",
                key,
                ", ".join(names),
                f"An array for one point alone is NAME@min or NAME@0.min (profiles: {len(profiles)}).",
            )
    cases = []
    for index, profile in enumerate(profiles):
        seen = []
        for point in ("opt", "min", "max"):
            nth = POINTS.index(point)
            what = [(_shape(profile, info, nth), _values(profile, info, nth)) for info in inputs]
            own = any(key in given for name in names for key in keys_for(name, index, point)[:2])
            if what in seen and not own:
                continue
            seen.append(what)
            arrays = {}
            for info, (shape, values) in zip(inputs, what, strict=True):
                if values is not None:
                    arrays[info.name] = np.array(values, info.dtype).reshape(shape)
                elif any(key in given for place in places for key in keys_for(info.name, *place)):
                    arrays[info.name] = _given(given, info, shape, index, point)
                else:
                    generator = np.random.default_rng([seed, index, nth, zlib.crc32(info.name.encode())])
                    arrays[info.name] = _random(generator, info, shape)
            cases.append(Case(index, point, arrays))
    return sorted(cases, key=lambda case: (case.profile, POINTS.index(case.point)))


def _shape(profile: Profile, info: NetworkInput, place: int) -> tuple[int, ...]:
    sizes = profile.shapes.get(info.name)
    return tuple(info.shape) if sizes is None else (sizes.min, sizes.opt, sizes.max)[place]


def _values(profile: Profile, info: NetworkInput, place: int) -> tuple[int, ...] | None:
    return profile.values[info.name][place] if info.name in profile.values else None


def _refused(why: str, found: str, allowed: str, step: str) -> BuildOptionError:
    return BuildOptionError(
        f"--inputs: {why}; found: {found}; allowed: {allowed}. {step}", option="--inputs", found=found, allowed=allowed
    )


def _given(given: Mapping[str, Array], info: NetworkInput, shape: tuple[int, ...], profile: int, point: Point) -> Array:
    array = pick(given, info.name, profile, point)
    if array is None or array.shape != shape:
        found = "nothing" if array is None else dims(array.shape)
        keys = " or ".join(map(repr, keys_for(info.name, profile, point)[:2]))
        raise _refused(
            f"input {info.name!r} at {point} of profile {profile} has another shape",
            found,
            dims(shape),
            f"Add an array of that shape to the file as {keys}.",
        )
    if info.dtype == "bfloat16" and array.dtype == np.float32:
        array = to_bfloat16(array)  # numpy alone cannot write one
    if dtype_name(array) != info.dtype:
        why = f"input {info.name!r} has another type"
        raise _refused(why, dtype_name(array), info.dtype, "Convert it before it is saved.")
    return np.asarray(array, order="C")


def _random(generator: np.random.Generator, info: NetworkInput, shape: tuple[int, ...]) -> Array:
    if info.dtype in ("int8", "uint8"):
        limits = np.iinfo(info.dtype)
        return generator.integers(limits.min, limits.max, shape, info.dtype, endpoint=True)
    if info.dtype == "bool" or (info.dtype.startswith(("int", "uint")) and info.dtype not in ("int4", "uint4")):
        values = generator.integers(0, 2, shape, np.int8)
        if values.ndim and values.size:
            values.reshape(-1)[-1] = 0
            values[..., 0] = 1
        return values.astype(info.dtype)
    normal = generator.standard_normal(shape, np.float32)
    if info.dtype == "bfloat16":
        return to_bfloat16(normal)
    try:
        return np.asarray(normal, dtype=info.dtype)
    except TypeError:
        raise _refused(
            f"input {info.name!r} is {info.dtype}, for which there are no random values",
            "nothing",
            f"{info.dtype}{dims(shape)}",
            "Give an array for it with --inputs.",
        ) from None
