"""Data sets for INT8 calibration: an .npz file, a folder of images with its preprocessing, or an iterable of mappings.

They are read in a fixed order, hashed, checked, and never made up. What comes out of a calibration is the business of
`calibration_cache`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import BuildOptionError
from .arrays import Array, dtype_name, load_npz, widened
from .preprocessing import Preprocessing

if TYPE_CHECKING:
    from .profiles import InputRange, NetworkInput, Profile

    Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]

__all__ = ["MINIMUM_SAMPLES", "CalibrationData", "Preprocessing", "load"]

Shape = tuple[int, ...]
#: "TensorRT recommends calibration data size to be at least 500 for CNN and ViT models", says onnx_ptq/README.md of
#: NVIDIA/TensorRT-Model-Optimizer, and to reduce it in resource constrained environments.
MINIMUM_SAMPLES = 500

_IMAGES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


def _refuse(message: str, *, option: str = "--calib-data", found: Any = None, allowed: Any = None) -> BuildOptionError:
    return BuildOptionError(message, option=option, found=found, allowed=allowed)


# -------------------------------------------------------------------------------------------------------- data sets


class _Items:
    """A data set as one sequence of items (arrays) for each input."""

    kind: ClassVar[str]
    name: str
    #: SHA-256 over content, names and preprocessing.
    sha256: str
    preprocessing: Preprocessing | None = None
    #: Number of items of each input.
    lengths: Mapping[str, int]

    def first(self) -> Mapping[str, Array]:
        raise NotImplementedError

    def groups(self, sizes: Mapping[str, int]) -> Iterator[Mapping[str, Sequence[Array]]]:
        """Batch for batch, the next `sizes[input]` items of every input."""
        raise NotImplementedError


class _Npz(_Items):
    kind = "npz"

    def __init__(self, path: Path, inputs: Sequence[NetworkInput]) -> None:
        arrays = load_npz(path, "--calib-data")
        self.name = str(path)
        missing = [one.name for one in inputs if one.name not in arrays]
        if missing:
            raise _missing(self.name, missing, arrays)
        self._arrays = {one.name: arrays[one.name] for one in inputs}
        for name, array in self._arrays.items():
            if not array.ndim or not len(array):
                raise _refuse(
                    f"{path}: array {name!r} has the shape {array.shape}; its first axis must be the samples."
                )
        self.lengths = {name: len(array) for name, array in self._arrays.items()}
        digest = hashlib.sha256(b"npz")
        for name in sorted(self._arrays):
            _add(digest, name, self._arrays[name])
        self.sha256 = digest.hexdigest()

    def first(self) -> Mapping[str, Array]:
        return {name: array[0] for name, array in self._arrays.items()}

    def groups(self, sizes: Mapping[str, int]) -> Iterator[Mapping[str, Sequence[Array]]]:
        for start in range(min(self.lengths[name] // size for name, size in sizes.items())):
            yield {name: list(self._arrays[name][start * size : (start + 1) * size]) for name, size in sizes.items()}


class _Stream(_Items):
    """Items that come one after another, all inputs of one at a time."""

    def items(self) -> Iterator[Mapping[str, Array]]:
        raise NotImplementedError

    def first(self) -> Mapping[str, Array]:
        return next(self.items())

    def groups(self, sizes: Mapping[str, int]) -> Iterator[Mapping[str, Sequence[Array]]]:
        size = max(sizes.values())
        if set(sizes.values()) != {size}:
            raise _refuse(
                f"{self.name}: an item must hold as many samples of one input as of the others; found {sizes}."
            )
        group: list[Mapping[str, Array]] = []
        for item in self.items():
            group.append(item)
            if len(group) == size:
                yield {name: [one[name] for one in group] for name in sizes}
                group = []


class _Images(_Stream):
    kind = "images"

    def __init__(self, folder: Path, inputs: Sequence[NetworkInput], preprocessing: Preprocessing) -> None:
        if len(inputs) != 1:
            raise _refuse(
                f"{folder}: images feed a network with one input, and this one has {len(inputs)} "
                f"({', '.join(one.name for one in inputs)}). Give an .npz file with an array for each."
            )
        self.name, self.preprocessing = str(folder), preprocessing
        self._input, self._apply = inputs[0].name, preprocessing.apply
        self._files = sorted(
            (path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file()),
            key=lambda path: path.relative_to(folder).parts,
        )
        if not self._files:
            raise _refuse(f"{folder}: no image in this folder; looked for {', '.join(sorted(_IMAGES))}.")
        self.lengths = {self._input: len(self._files)}
        digest = hashlib.sha256(f"images {preprocessing.text()}".encode())
        for path in self._files:
            digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        self.sha256 = digest.hexdigest()

    def items(self) -> Iterator[Mapping[str, Array]]:
        return ({self._input: self._apply(path)} for path in self._files)


class _Iterable(_Stream):
    kind = "iterable"

    def __init__(self, source: Any, inputs: Sequence[NetworkInput]) -> None:
        self.name = "the calibration data"
        self._names = [one.name for one in inputs]
        if callable(source):
            self._source = source
        else:
            # What can be read once only is kept.
            kept = list(source) if iter(source) is source else source
            self._source = lambda: kept
        self.sha256, count = "", 0
        for _ in self.items():
            count += 1
        if not count:
            raise _refuse("the calibration data are empty: the iterable gave no mapping.")
        self.lengths = dict.fromkeys(self._names, count)

    def items(self) -> Iterator[Mapping[str, Array]]:
        digest = hashlib.sha256(b"iterable")
        for index, given in enumerate(self._source()):
            if not isinstance(given, Mapping):
                raise _refuse(
                    f"calibration item {index} is a {type(given).__name__}; a mapping from input to array is needed."
                )
            missing = [name for name in self._names if name not in given]
            if missing:
                raise _missing(f"calibration item {index}", missing, given)
            item = {name: np.asarray(given[name]) for name in self._names}
            if any(array.dtype.hasobject for array in item.values()):
                raise _refuse(f"calibration item {index} holds Python objects where arrays of numbers are needed.")
            for name in sorted(item):
                _add(digest, name, item[name])
            yield item
        # The first pass finds the digest, every later one must give it again.
        if self.sha256 and digest.hexdigest() != self.sha256:
            raise _refuse(
                "the calibration data changed between two passes over the iterable. Give a list, or an object that "
                "iterates over the same data in the same order every time."
            )
        self.sha256 = digest.hexdigest()


def _add(digest: Any, name: str, array: Array) -> None:
    digest.update(f"\0{name}\0{dtype_name(array)}\0{array.shape}\0".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _missing(where: str, missing: Sequence[str], given: Iterable[Any]) -> BuildOptionError:
    return _refuse(
        f"{where}: nothing for the network's input {', '.join(map(repr, missing))}; found: "
        f"{', '.join(map(repr, given)) or 'nothing'}. Every input needs data, under its name in the network.",
        found=[str(name) for name in given],
        allowed=list(missing),
    )


@dataclass
class CalibrationData:
    """A data set, cut into batches of the calibration shapes. Iterating gives ``{input: array}`` batch for batch, in
    the same order every time, and checks what it gives; `check` does that without keeping anything."""

    name: str
    kind: str
    sha256: str
    preprocessing: Preprocessing | None
    #: The calibration profile: min = opt = max.
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    batches: int
    samples: int
    _items: _Items = field(repr=False)
    _sizes: Mapping[str, int] = field(repr=False)
    #: Remarks about the data; complete after one pass.
    findings: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        extremes: dict[str, tuple[Any, Any]] = {}
        for number, group in enumerate(self._items.groups(self._sizes)):
            yield {name: self._batch(number, name, items, extremes) for name, items in group.items()}
        self.findings[:] = []
        for name, (low, high) in extremes.items():
            if low != high:
                continue
            what = f"{self.name}: input {name!r} is {'all zero' if not low else f'{low} everywhere'} in every sample"
            if "float" in self.dtypes[name]:
                raise _refuse(f"{what}; nothing can be calibrated with that. Check how the data were made.", found=low)
            self.findings.append(f"{what}; the other branch of the network is then never seen")

    def check(self) -> None:
        """Reads everything once. Raises `BuildOptionError` for another shape or dtype in the middle, NaN or infinity,
        and a float input that never changes."""
        for _ in self:
            pass

    def _batch(self, number: int, name: str, items: Sequence[Array], extremes: dict[str, tuple[Any, Any]]) -> Array:
        shape, dtype = self.shapes[name], self.dtypes[name]
        rows = [item.reshape(1, *item.shape) if item.ndim < len(shape) else item for item in items]
        where = f"{self.name}: batch {number} of input {name!r}"
        if any(dtype_name(row) != dtype or row.shape[1:] != shape[1:] for row in rows):
            found = sorted({f"{dtype_name(row)}{list(row.shape[1:])}" for row in rows})
            raise _refuse(
                f"{where} holds {' and '.join(found)}, the items before {dtype}{list(shape[1:])}.", found=found
            )
        batch: Array = np.concatenate(rows) if shape else rows[0]
        if batch.shape != shape:
            raise _refuse(f"{where} has the shape {list(batch.shape)}, not {list(shape)}.", found=list(batch.shape))
        wide = widened(batch)
        if wide.dtype.kind == "f" and not np.isfinite(wide).all():
            raise _refuse(f"{where} holds NaN or infinity. Check how the data were made.")
        if wide.size:
            low, high = extremes.get(name, (math.inf, -math.inf))
            extremes[name] = (min(low, wide.min().item()), max(high, wide.max().item()))
        return np.ascontiguousarray(batch, dtype=batch.dtype.newbyteorder("="))

    def to_mapping(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "sha256": self.sha256,
            "preprocessing": self.preprocessing and self.preprocessing.to_mapping(),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "batches": self.batches,
            "samples": self.samples,
            "findings": list(self.findings),
        }


def load(
    source: Source | None,
    inputs: Sequence[NetworkInput],
    profile: Profile,
    *,
    preprocessing: Preprocessing | None = None,
    batch_size: int | None = None,
    minimum: int = MINIMUM_SAMPLES,
) -> CalibrationData:
    """Opens a data set for the network's `inputs` and fixes the shapes to calibrate with.

    An array of an .npz file has its samples along the first axis: either rows of the input (rank of the input; they are
    taken together until the input's first dimension is full) or whole inputs (one rank more). An item of an iterable is
    a row (one rank less) or a whole input, which is never cut. What the profile leaves open comes from the data; a
    first dimension that both leave open is `batch_size`, else the profile's opt. The content is checked as it is read
    (`CalibrationData.check` reads all).

    Raises `BuildOptionError` where something is missing, does not fit, or the last batch would be short.
    """
    if source is None:
        raise _refuse(
            "int8 calibration needs data, and none were given; they are never made up. Give --calib-data: an .npz file "
            "with one array for each input, a folder of images, or an iterable. A model with Q/DQ nodes needs none."
        )
    items = _open(source, inputs, preprocessing)
    firsts = items.first()
    shapes, sizes, counts = {}, {}, {}
    for one in inputs:
        first = firsts[one.name]
        if dtype_name(first) != one.dtype:
            raise _refuse(
                f"{items.name}: input {one.name!r} is {dtype_name(first)}; the network takes {one.dtype}. "
                "Convert it when the data are made: nothing is cast here.",
                found=dtype_name(first),
                allowed=one.dtype,
            )
        shapes[one.name], sizes[one.name] = _calibration_shape(items, one, first, profile.shapes[one.name], batch_size)
        count, size = items.lengths[one.name], sizes[one.name]
        if count % size:
            raise _refuse(
                f"{items.name}: {count} samples of input {one.name!r} do not fill batches of {size}: the last would "
                f"hold {count % size}. Remove {count % size}, or choose a --calib-batch that divides {count}.",
                found=count,
                allowed=f"a multiple of {size}",
            )
        counts[one.name] = count // size
    batches = min(counts.values(), default=0)
    if len(set(counts.values())) > 1:
        raise _refuse(f"{items.name}: the inputs do not hold the same number of batches: {counts}.", found=counts)
    samples = batches * min((shape[0] for shape in shapes.values() if shape), default=1)
    if samples < minimum:
        raise _refuse(
            f"{items.name}: {samples} samples are fewer than {minimum}, which int8 calibration should have at least. "
            f"Add data, or accept fewer with --calib-min-samples {samples}.",
            found=samples,
            allowed=minimum,
        )
    return CalibrationData(
        name=items.name,
        kind=items.kind,
        sha256=items.sha256,
        preprocessing=items.preprocessing,
        shapes=shapes,
        dtypes={one.name: one.dtype for one in inputs},
        batches=batches,
        samples=samples,
        _items=items,
        _sizes=sizes,
    )


def _open(source: Any, inputs: Sequence[NetworkInput], preprocessing: Preprocessing | None) -> _Items:
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, Mapping) or not (callable(source) or isinstance(source, Iterable)):
            raise _refuse(
                f"--calib-data is a {type(source).__name__}; allowed: a path, an iterable of mappings, or a function "
                "that returns one.",
                found=type(source).__name__,
            )
        path = None
    else:
        path = Path(source)
    if path is not None and path.is_dir():
        if preprocessing is None:
            raise _refuse(
                f"{path}: say how its images become tensors, exactly as the application does it: "
                f"--calib-preprocess {Preprocessing.SYNTAX}",
                option="--calib-preprocess",
            )
        return _Images(path, inputs, preprocessing)
    if preprocessing is not None:
        raise _refuse(
            f"{path or 'the calibration data'}: preprocessing is for a folder of images; arrays are used as they are.",
            option="--calib-preprocess",
        )
    return _Npz(path, inputs) if path is not None else _Iterable(source, inputs)


def _calibration_shape(
    items: _Items, one: NetworkInput, item: Array, allowed: InputRange, batch_size: int | None
) -> tuple[Shape, int]:
    """The shape to calibrate this input with, and how many items make it."""
    rank = len(one.shape)
    if rank == 0 and item.ndim == 0:
        return (), 1
    whole = item.ndim == rank
    if rank == 0 or (not whole and item.ndim != rank - 1):
        raise _refuse(
            f"{items.name}: a sample of input {one.name!r} has {item.ndim} dimensions {list(item.shape)}; the "
            f"network's input has {rank}: {list(one.shape)}.",
            found=list(item.shape),
            allowed=list(one.shape),
        )
    rows = item.shape[0] if whole else 1
    fixed = allowed.min[0] == allowed.max[0]
    lead = allowed.opt[0] if fixed else max(batch_size or 0, rows) if whole else batch_size or allowed.opt[0]
    shape = (lead, *item.shape[whole:])
    if any(not low <= size <= high for low, size, high in zip(allowed.min, shape, allowed.max, strict=True)):
        raise _refuse(
            f"{items.name}: input {one.name!r} would be calibrated with {list(shape)}; the profile allows "
            f"{list(allowed.min)} to {list(allowed.max)}.",
            found=list(shape),
            allowed=[list(allowed.min), list(allowed.max)],
        )
    if not rows or lead % rows:
        raise _refuse(
            f"{items.name}: {rows} rows of input {one.name!r} in an item do not fill a first dimension of {lead}.",
            found=rows,
            allowed=lead,
        )
    return shape, lead // rows
