"""Arrays of the types that numpy lacks, and .npz files with the tensors of several cases."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BuildOptionError

if TYPE_CHECKING:
    import os

__all__ = ["Array", "dtype_name", "from_bits", "keys_for", "load_npz", "owner", "pick", "to_bfloat16", "widened"]

Array = npt.NDArray[Any]


# -------------------------------------------------------------------------------------------------- bfloat16 in numpy


def dtype_name(array: Array) -> str:
    """The element type as jetrt writes it. numpy has no bfloat16: it is ml_dtypes' or, as .npy files keep it, "V2"."""
    return "bfloat16" if array.dtype == np.dtype("V2") else array.dtype.name


def widened(array: Array) -> Array:
    """A float type that numpy computes with, holding the same values; other types come back as they are."""
    if dtype_name(array) == "bfloat16":
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint16).astype(np.uint32) << np.uint32(16)
        wide: Array = bits.view(np.float32).reshape(array.shape)
        return wide
    return array.astype(np.float32) if dtype_name(array).startswith("float8") else array


def to_bfloat16(values: Array) -> Array:
    """float32 rounded to nearest even, as an array of ml_dtypes' bfloat16 where that package is there, else of "V2"."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    # A NaN could round to infinity (or past the end of the word), so it gets a mantissa bit of its own.
    tie = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.where(np.isnan(bits.view(np.float32)), bits | np.uint32(0x400000), bits + np.uint32(0x7FFF) + tie)
    half = (rounded >> np.uint32(16)).astype(np.uint16)
    return from_bits(half.reshape(values.shape))


def from_bits(bits: Array) -> Array:
    """The bits (uint16) as bfloat16."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return bits.view("V2")
    array: Array = bits.view(bfloat16)
    return array


# ---------------------------------------------------------------------------------------------------------- .npz files


_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error)


def load_npz(path: str | os.PathLike[str], option: str) -> dict[str, Array]:
    """Every array of an .npz file; nothing in it is ever unpickled. A file that is none is a `BuildOptionError`."""
    try:
        with Path(path).open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise BuildOptionError(f"{option} {path}: there is no such file.", option=option, found=str(path)) from error
    except (OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError, *_ZIP_ERRORS) as error:
        raise BuildOptionError(
            f"{option} {path} is not an .npz file of plain arrays: {error}. "
            "Write it with numpy.savez(file, NAME=array, ...).",
            option=option,
            found=str(path),
        ) from error


def keys_for(name: str, profile: int, point: str) -> tuple[str, str, str]:
    """The keys that an .npz file may have for a tensor, the most particular one first."""
    return f"{name}@{profile}.{point}", f"{name}@{point}", name


def pick(arrays: Mapping[str, Array], name: str, profile: int, point: str) -> Array | None:
    """The array for a tensor at a point: "NAME@0.min" (of profile 0), "NAME@min" (of every profile), or "NAME"."""
    return next((arrays[key] for key in keys_for(name, profile, point) if key in arrays), None)


def owner(key: str, names: Container[str] | None) -> str:
    """The tensor that a key of an .npz file is for. A tensor's own name may hold an "@"."""
    return key if names is not None and key in names else key.rpartition("@")[0] or key
