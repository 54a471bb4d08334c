"""How an image becomes a tensor for calibration: stated, in words for a command line, a manifest and a hash."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ..errors import BuildOptionError, EngineBuildError
from .arrays import Array

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor: turned upright (EXIF), converted to `color`, stretched to `resize` by pillow's
    antialiased bilinear filter, then ``(pixel * scale - mean) / std`` in float32, in `layout`, as `dtype`."""

    #: Width, height.
    resize: tuple[int, int]
    layout: Literal["nchw", "nhwc"]
    color: Literal["rgb", "bgr", "gray"]
    #: Pixels are 0 … 255.
    scale: float
    #: One for each channel, in the order of `color`; empty: 0 and 1.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: Literal["float32", "float16", "uint8"] = "float32"

    SYNTAX: ClassVar[str] = (
        "resize=640x640,layout=nchw,color=rgb,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,dtype=float32"
    )

    def __post_init__(self) -> None:
        channels = 1 if self.color == "gray" else 3
        for name, allowed in (
            ("layout", ("nchw", "nhwc")),
            ("color", ("rgb", "bgr", "gray")),
            ("dtype", ("float32", "float16", "uint8")),
        ):
            if getattr(self, name) not in allowed:
                raise self._wrong(name, " or ".join(allowed))
        if [0 < size <= 1 << 16 for size in self.resize] != [True, True]:
            raise self._wrong("resize", "width x height in pixels")
        if not (math.isfinite(self.scale) and self.scale):
            raise self._wrong("scale", "a number other than 0, or 1/255")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if (
                len(values) not in (0, channels)
                or not all(map(math.isfinite, values))
                or (name == "std" and 0 in values)
            ):
                raise self._wrong(name, f"{channels} numbers between colons" + " other than 0" * (name == "std"))
        if self.dtype == "uint8" and (self.scale != 1 or any(self.mean) or any(x != 1 for x in self.std)):
            raise self._wrong(
                "dtype", "uint8 with scale=1 and neither mean nor std, which would not stay whole numbers"
            )

    def _wrong(self, name: str, allowed: str) -> BuildOptionError:
        return _refused(
            f"preprocessing: {name} is {getattr(self, name)!r}; allowed: {allowed}. The form is {self.SYNTAX}",
            found=getattr(self, name),
            allowed=allowed,
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the form of the command line; mean, std and dtype may be left out. Raises `BuildOptionError`."""

        def numbers(value: str) -> tuple[float, ...]:
            return tuple(map(number, value.split(":")))

        def number(value: str) -> float:
            above, slash, below = value.partition("/")
            return float(above) / float(below) if slash else float(above)

        def size(value: str) -> tuple[int, ...]:
            return tuple(map(int, value.lower().split("x")))

        readers: dict[str, Callable[[str], Any]] = {"resize": size, "scale": number, "mean": numbers, "std": numbers}
        given: dict[str, Any] = {}
        problem = ""
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in {one.name for one in fields(cls)} or name in given:
                problem = f"{part.strip()!r} is not one of its parts, or stands there twice"
                break
            try:
                given[name] = readers.get(name, str)(value.lower())
            except (ValueError, ZeroDivisionError):
                problem = f"{part.strip()!r} is not a number of its kind"
                break
        missing = [name for name in ("resize", "layout", "color", "scale") if name not in given]
        if not problem and missing:
            problem = f"{', '.join(missing)} must be stated"
        if problem:
            raise _refused(
                f"preprocessing {text!r}: {problem}. The form is {cls.SYNTAX}", option="--calib-preprocess", found=text
            )
        return cls(**given)

    def text(self) -> str:
        """The form that `parse` reads, everything stated."""

        def joined(values: Iterable[float]) -> str:
            return ":".join(map(repr, values))

        lists = "".join(f",{name}={joined(getattr(self, name))}" for name in ("mean", "std") if getattr(self, name))
        width, height = self.resize
        return (
            f"resize={width}x{height},layout={self.layout},color={self.color},scale={self.scale!r}{lists},"
            f"dtype={self.dtype}"
        )

    def to_mapping(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)} | {
            "resize": list(self.resize),
            "mean": list(self.mean),
            "std": list(self.std),
            "filter": "bilinear, antialiased (pillow)",
        }

    def apply(self, path: Path) -> Array:
        """The image as a tensor without a batch axis. Raises `BuildOptionError` for a file that is no image."""
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise EngineBuildError(
                "calibration from images needs pillow: pip install 'jetrt[build]', or give an .npz file"
            ) from None
        try:
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened).convert("L" if self.color == "gray" else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _refused(f"{path}: not an image that can be read: {error}. Remove it or repair it.") from error
        pixels: Array = np.asarray(image.resize(self.resize, Image.Resampling.BILINEAR))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if self.color == "bgr":
            pixels = pixels[..., ::-1]
        if self.dtype != "uint8":
            mean, std = np.array(self.mean or 0, np.float32), np.array(self.std or 1, np.float32)
            pixels = (pixels.astype(np.float32) * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(pixels if self.layout == "nhwc" else pixels.transpose(2, 0, 1), dtype=self.dtype)


def _refused(message: str, **fields: Any) -> BuildOptionError:
    return BuildOptionError(message, **{"option": "--calib-preprocess", **fields})
