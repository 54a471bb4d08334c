"""Types and memory formats of a plan's inputs and outputs (``--io-formats``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import BuildOptionError
from .hints import did_you_mean

__all__ = ["IoFormat", "parse_io_format"]

_DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    **{name: name for name in ("int8", "uint8", "int32", "int64", "bool", "float32", "float16", "bfloat16")},
    "any": None,
}
_FORMATS = (
    *("LINEAR", "CHW2", "HWC8", "CHW4", "CHW16", "CHW32", "DHWC8", "CDHW32", "HWC", "DLA_LINEAR", "DLA_HWC4"),
    *("HWC16", "DHWC"),
)
_IO_FORMAT = re.compile(rf"(?s)(?P<name>.+):(?P<dtype>{'|'.join(_DTYPES)})(?::(?P<formats>[\w+]+))?")


@dataclass(frozen=True)
class IoFormat:
    name: str
    #: ``None``: as the network has it.
    dtype: str | None
    #: Members of TensorFormat; empty: whichever TensorRT likes.
    formats: tuple[str, ...] = ()


def parse_io_format(text: str) -> IoFormat:
    """From ``NAME:fp16:chw16+hwc8``: type, or ``any``, and memory formats."""
    match = _IO_FORMAT.fullmatch(text)
    names = match["formats"].upper().split("+") if match and match["formats"] else []
    formats = ["LINEAR" if name == "CHW" else name for name in names]
    wrong = next((name for name in formats if name not in _FORMATS), None)
    if match is None or wrong is not None:
        what = f"there is no format {wrong!r}.{did_you_mean(wrong, _FORMATS)}" if wrong else ""
        raise BuildOptionError(
            f"--io-formats {text!r} is not NAME:TYPE:FORMAT+FORMAT. {what} Types: {', '.join(_DTYPES)}; formats: "
            f"{', '.join(_FORMATS)}.".replace("  ", " "),
            option="--io-formats",
            found=text,
            allowed=[*_DTYPES, *_FORMATS],
        )
    return IoFormat(match["name"], _DTYPES[match["dtype"]], tuple(formats))
