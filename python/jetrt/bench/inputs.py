"""Inputs of a row: shapes from the model, --shape, --imgsz and the batch; values from a file, or random by seed.

The first dimension of an input is its batch where it is dynamic. Nothing else is guessed: a dynamic dimension that
neither --shape nor --imgsz nor a profile fills is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..builder.arrays import Array, load_npz
from ..builder.cases import points
from ..builder.profiles import InputRange, NetworkInput, Profile
from ..errors import BenchOptionError
from ..report import dims
from .options import BenchOptions

if TYPE_CHECKING:
    from .subjects import Subject

__all__ = ["BatchError", "batch_of", "check_batch", "size_of", "sized", "values"]

Shape = tuple[int, ...]


class BatchError(BenchOptionError):
    """The model does not take that batch; other batches may do."""


def batch_of(infos: Sequence[NetworkInput], asked: int | None, options: BenchOptions) -> int:
    """The batch of a row. ``None`` asks for that of --shape or --inputs, else for 1, or for what the model is fixed at.
    Raises `BatchError`."""
    dynamic = [info.name for info in infos if info.shape[:1] == (-1,)]
    if dynamic:
        return asked or _given_batch(dynamic, options) or 1
    own = next((info.shape[0] for info in infos if info.shape), 1)
    if asked not in (None, own):
        fixed = ", ".join(f"{info.name} {dims(info.shape)}" for info in infos)
        raise BatchError(
            f"--batch {asked}: the first dimension of no input is dynamic ({fixed}). Export the model with a dynamic "
            "batch, or leave --batch out.",
            option="--batch",
            found=asked,
            allowed=own,
        )
    return own


def _given_batch(names: Sequence[str], options: BenchOptions) -> int | None:
    shapes = [options.shapes[name][0] for name in names if name in options.shapes]
    if options.inputs is not None:
        arrays = load_npz(options.inputs, "--inputs")
        shapes += [arrays[name].shape for name in names if name in arrays]
    return next((shape[0] for shape in shapes if shape), None)


def check_batch(subject: Subject, asked: int | None, inputs: Mapping[Any, Any], options: BenchOptions) -> None:
    """Inputs that came with a module or callable, or from a file, must have the batch that was asked for. Raises
    `BatchError`. A function that was told the batch is believed."""
    if subject.takes_batch and options.inputs is None:
        return
    shapes = {key: tuple(value.shape) for key, value in inputs.items() if getattr(value, "shape", None)}
    if asked is not None and all(shape[0] != asked for shape in shapes.values()):
        found = ", ".join(f"{key} {dims(shape)}" for key, shape in shapes.items()) or "no array"
        raise BatchError(
            f"--batch {asked}: no input of {subject.name} has that first dimension ({found}). Make example_inputs a "
            "function of the batch, give an --inputs file of that batch, or leave --batch out.",
            option="--batch",
            found=asked,
        )


def sized(
    infos: Sequence[NetworkInput],
    batch: int,
    options: BenchOptions,
    usual: Mapping[str, Shape] | None = None,
    *,
    named: str = "the model",
    sole: bool = True,
) -> dict[str, Shape]:
    """The shape of every input. `usual` are those of a profile's optimum, for dimensions that nothing else fills.
    `sole`: it is the only subject, so that a --shape of another name is for nothing."""
    names = [info.name for info in infos]
    shapes = {}
    for info in infos:
        shape = list(info.shape)
        given = options.shapes.get(info.name, (None, None))[0]
        if given is not None:
            if len(given) != len(shape) or any(own not in (-1, size) for own, size in zip(shape, given, strict=True)):
                raise _unfit(info, given)
            # --batch is for all of them; without it each has what was said of it.
            shape = list(given)
            if info.shape[:1] == (-1,) and options.batches is not None:
                shape[0] = batch
        else:
            if shape[:1] == [-1]:
                shape[0] = batch
            for axis in _image_axes(info.shape):
                if shape[axis] < 0 and options.imgsz is not None:
                    shape[axis] = options.imgsz
            for axis, size in enumerate((usual or {}).get(info.name, ())):
                if shape[axis] < 0:
                    shape[axis] = size
        open_axes = [
            (info.dimension_names[axis] if axis < len(info.dimension_names) else None) or f"axis {axis}"
            for axis, size in enumerate(shape)
            if size < 0
        ]
        if open_axes:
            raise BenchOptionError(
                f"input {info.name!r} of {named} is {dims(info.shape)}: nothing says how large {', '.join(open_axes)} "
                f"is. Add --shape {info.name}={'x'.join('N' if s < 0 else str(s) for s in shape)}.",
                option="--shape",
                found=list(info.shape),
            )
        shapes[info.name] = tuple(shape)
    unknown = [name for name in options.shapes if name not in names]
    if sole and unknown:
        known = ", ".join(names)
        raise BenchOptionError(
            f"--shape {unknown[0]}: the inputs of {named} are {known}.", option="--shape", allowed=known
        )
    return shapes


def _unfit(info: NetworkInput, given: Shape) -> BenchOptionError:
    return BenchOptionError(
        f"--shape {info.name}={'x'.join(map(str, given))}: the input is {dims(info.shape)} (-1: any).",
        option="--shape",
        found=list(given),
        allowed=list(info.shape),
    )


def _image_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Height and width of an image: of NCHW, or of NHWC where the last dimension alone is one of channels."""
    if len(shape) != 4:
        return ()
    return (1, 2) if shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4) else (2, 3)


def size_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """ "480" or "736x960" of the first image, else the first input's dimensions behind the batch, "970x1024"."""
    for shape in shapes.values():
        axes = _image_axes(shape)
        if axes:
            sides = [shape[axis] for axis in axes]
            return str(sides[0]) if sides[0] == sides[1] else "x".join(map(str, sides))
    first = next((shape for shape in shapes.values() if len(shape) > 1), ())
    return "x".join(map(str, first[1:]))


def values(
    infos: Sequence[NetworkInput], shapes: Mapping[str, Shape], options: BenchOptions, *, sole: bool = True
) -> dict[str, Array]:
    """Arrays of these shapes: what --inputs has for a name, the rest random (`builder.cases.points` says how)."""
    profile = Profile({name: InputRange(shape, shape, shape) for name, shape in shapes.items()})
    fixed = [replace(info, shape=shapes[info.name]) for info in infos]
    given = _given(infos, options, sole)
    try:
        (case,) = points([profile], fixed, given=given, seed=options.seed)
    except Exception as error:
        if isinstance(error, ValueError):
            raise BenchOptionError(str(error), option="--inputs") from error
        raise
    return dict(case.inputs)


def _given(infos: Sequence[NetworkInput], options: BenchOptions, sole: bool) -> dict[str, Array]:
    """Of the file, what this subject has inputs for: one file may serve all components of a pipeline."""
    if options.inputs is None:
        return {}
    arrays = load_npz(options.inputs, "--inputs")
    names = {info.name for info in infos}
    found = {name: array for name, array in arrays.items() if name in names}
    if not found and sole:
        allowed = ", ".join(names)
        raise BenchOptionError(
            f"--inputs {options.inputs} has {', '.join(arrays) or 'nothing'}; the inputs are {allowed}.",
            option="--inputs",
            allowed=allowed,
        )
    return found
