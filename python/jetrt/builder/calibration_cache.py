"""TensorRT's calibration cache: its text, the sidecar that says what it was made from, and what it covers.

The text is ``TRT-<version>-<algorithm>``, then ``tensor: hex`` for each tensor, the digits being a float32 scale
(largest absolute value / 127). TensorRT compares the first line alone, and calibrates again in silence when it does not
like it (NVIDIA/TensorRT#1378). So ``<cache>.json`` binds the cache to the model, the data set, the preprocessing, the
shapes, the algorithm, the version of TensorRT, and to its own bytes; whatever differs is a `CalibrationCacheError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import CalibrationCacheError, EngineBuildError
from ..provenance.publish import replace_text

if TYPE_CHECKING:
    import os

    from .calibration import CalibrationData
    from .profiles import NetworkInput

__all__ = [
    "ALGORITHMS",
    "ALLOWED_WITHOUT_RANGE",
    "Algorithm",
    "Cache",
    "Coverage",
    "check_cache",
    "check_calls",
    "check_log",
    "coverage",
    "network_tensors",
    "parse_cache",
    "save_cache",
    "sidecar_of",
]

Algorithm = Literal["entropy", "minmax"]

#: Our name of an algorithm -> TensorRT's, as it stands in the first line of a cache.
ALGORITHMS: Mapping[str, str] = {"entropy": "EntropyCalibration2", "minmax": "MinMaxCalibration"}
SCHEMA = "jetrt-calibration-1"
#: Part of the network's tensors that may be without a range in the log of a build: constants and what computes shapes
#: never have one (seen on NVIDIA/TensorRT#4058). A choice of ours; a cache of another model is far above it.
ALLOWED_WITHOUT_RANGE = 0.2

_HEADER = re.compile(r"TRT-(\d{4,6})-(\w{1,64})")
_LARGEST = 64 << 20  # bytes; a network of a million tensors

# ------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Cache:
    """A calibration cache as TensorRT writes it."""

    #: As the first line has it: 100600 for 10.6.0, 8601 for 8.6.1.
    version: int
    #: TensorRT's name: "EntropyCalibration2", "MinMaxCalibration".
    algorithm: str
    #: Tensor -> scale, which is its largest absolute value / 127; 0: it was zero throughout.
    scales: Mapping[str, float]

    def text(self) -> str:
        lines = [f"TRT-{self.version}-{self.algorithm}"]
        lines += (f"{name}: {struct.pack('>f', scale).hex().lstrip('0') or '0'}" for name, scale in self.scales.items())
        return "\n".join(lines) + "\n"


def parse_cache(data: bytes, path: str | os.PathLike[str] = "calibration cache") -> Cache:
    """Reads TensorRT's text. Raises `CalibrationCacheError` that names the line which is not."""

    def refuse(line: int, found: str, expected: str) -> CalibrationCacheError:
        return _distrust(Path(path), f"line {line} is {found}; expected {expected}.", found, expected)

    if len(data) > _LARGEST:
        raise refuse(1, f"the first of {len(data)} bytes", f"at most {_LARGEST} bytes")
    try:
        first, *lines = data.decode().rstrip("\r\n").split("\n")
    except UnicodeDecodeError as error:
        raise refuse(data.count(b"\n", 0, error.start) + 1, "not UTF-8", "text") from None
    header = _HEADER.fullmatch(first.rstrip("\r"))
    if header is None:
        raise refuse(1, _shown(first), "TRT-<version>-<algorithm>")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, 2):
        name, colon, digits = line.rstrip("\r").rpartition(": ")
        if not colon or not name or not re.fullmatch(r"[0-9a-fA-F]{1,8}", digits):
            raise refuse(number, _shown(line), "a tensor's name, a colon and up to 8 hex digits")
        scale = struct.unpack(">f", int(digits, 16).to_bytes(4, "big"))[0]
        if not (math.isfinite(scale) and math.copysign(1, scale) > 0):
            raise refuse(number, f"the scale {scale} of {_shown(name)}", "a finite number that is not negative")
        if name in scales:
            raise refuse(number, f"{_shown(name)} a second time", "every tensor once")
        scales[name] = scale
    if not scales:
        raise refuse(1, "the only line", "a scale for at least one tensor")
    return Cache(int(header[1]), header[2], scales)


# ---------------------------------------------------------------------------------------------------------- sidecar


def sidecar_of(path: str | os.PathLike[str]) -> Path:
    """``x.cache`` -> ``x.cache.json``."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def save_cache(
    path: str | os.PathLike[str],
    content: bytes,
    *,
    model: str,
    data: CalibrationData,
    algorithm: Algorithm,
    tensorrt: Sequence[int],
) -> Cache:
    """Writes what TensorRT gave as its cache, then the sidecar. Each appears in one step, the sidecar last: a crash in
    between leaves a pair that `check_cache` refuses, never a wrong one that it takes.

    `model` is the SHA-256 of the model, `tensorrt` (major, minor, patch). Raises `CalibrationCacheError` where the
    content is not of this algorithm and version, `EngineBuildError` where it cannot be written.
    """
    path = Path(path)
    cache = parse_cache(content, path)
    _compare_header(path, cache, algorithm, tensorrt)
    replace_text(path, content.decode())
    record = {
        "schema": SCHEMA,
        "cache": {"sha256": hashlib.sha256(content).hexdigest(), "tensors": len(cache.scales)},
        "identity": _identity(model, data, algorithm, tensorrt),
        "data": data.to_mapping(),
    }
    replace_text(sidecar_of(path), json.dumps(record, indent=2) + "\n")
    return cache


def check_cache(
    path: str | os.PathLike[str],
    *,
    model: str,
    data: CalibrationData | None,
    algorithm: Algorithm,
    tensorrt: Sequence[int],
) -> Cache:
    """Reads a cache that was made from exactly this model, data set, preprocessing, shapes, algorithm and TensorRT.

    Raises `CalibrationCacheError` (``found``, ``expected``) for every difference, for a cache without its sidecar, and
    for one whose bytes changed since. Without the data set nothing can be compared, so that is refused too.
    """
    path, sidecar = Path(path), sidecar_of(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _distrust(path, f"it cannot be read: {error.strerror}.", "nothing", "a calibration cache") from error
    if data is None:
        raise _distrust(path, "the data set that it came from is not given.", "no data set", "the data set")
    try:
        record = json.loads(sidecar.read_bytes())
        schema, digest = str(record["schema"]), str(record["cache"]["sha256"])
        identity = {str(key): str(value) for key, value in record["identity"].items()}
    except FileNotFoundError:
        why = f"there is no {sidecar.name}, which says what it was made from."
        raise _distrust(path, why, "no sidecar", sidecar.name) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _distrust(path, f"{sidecar.name} is damaged: {error!r}.", "a damaged sidecar", "a whole one") from error
    _compare(path, {"schema": schema}, {"schema": SCHEMA})
    _compare(path, identity, _identity(model, data, algorithm, tensorrt))
    _compare(path, {"SHA-256 of the cache": hashlib.sha256(content).hexdigest()}, {"SHA-256 of the cache": digest})
    cache = parse_cache(content, path)
    _compare_header(path, cache, algorithm, tensorrt)
    return cache


def _identity(model: str, data: CalibrationData, algorithm: str, tensorrt: Sequence[int]) -> dict[str, str]:
    return {
        "model": model,
        "data set": data.sha256,
        "preprocessing": "none" if data.preprocessing is None else data.preprocessing.text(),
        "shapes": ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in sorted(data.shapes.items())),
        "algorithm": algorithm,
        "TensorRT": ".".join(map(str, tensorrt[:3])),
    }


def _compare_header(path: Path, cache: Cache, algorithm: str, tensorrt: Sequence[int]) -> None:
    # Two digits a part from 10 on: TRT-8601 is 8.6.1, TRT-100300 is 10.3.0.
    major, minor, patch = tensorrt[:3]
    version = major * (10_000 if major >= 10 else 1000) + minor * 100 + patch
    expected = f"TRT-{version}-{ALGORITHMS[algorithm]}"
    _compare(path, {"first line": f"TRT-{cache.version}-{cache.algorithm}"}, {"first line": expected})


def _compare(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    wrong = [key for key in expected if found.get(key) != expected[key]]
    if wrong:
        there = "; ".join(f"{key} {found.get(key, 'not stated')}" for key in wrong)
        here = "; ".join(f"{key} {expected[key]}" for key in wrong)
        why = f"another {', '.join(wrong)}.\n  found:    {there}\n  expected: {here}"
        raise _distrust(path, why, there, here)


def _distrust(path: Path, why: str, found: str, expected: str) -> CalibrationCacheError:
    return CalibrationCacheError(
        f"{path}: this calibration cache cannot be trusted: {why}\nRebuild it with --recalibrate.",
        path=str(path),
        found=found,
        expected=expected,
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")


# ------------------------------------------------------------------------------------------------------ what it did


@dataclass(frozen=True)
class Coverage:
    """Which tensors of the network have a range in a cache."""

    covered: tuple[str, ...]
    missing: tuple[str, ...]
    #: In the cache with a range of zero: they were zero for the whole data set.
    zero: tuple[str, ...]
    #: In the cache, and not in the network.
    foreign: tuple[str, ...]

    @property
    def share(self) -> float:
        total = len(self.covered) + len(self.missing)
        return len(self.covered) / total if total else 1.0

    def text(self) -> str:
        lines = [
            f"calibration: {len(self.covered)} of {len(self.covered) + len(self.missing)} tensors have a range "
            f"({100 * self.share:.1f} %)"
        ]
        for what, names in (
            ("without", self.missing),
            ("zero throughout", self.zero),
            ("not in the network", self.foreign),
        ):
            if names:
                more = f" … and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"  {what}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)

    def to_mapping(self) -> dict[str, Any]:
        return {**{key: list(value) for key, value in vars(self).items()}, "share": self.share}


def coverage(cache: Cache, tensors: Iterable[str]) -> Coverage:
    """Compares a cache with the network's tensors (`network_tensors`)."""
    tensors = list(dict.fromkeys(tensors))
    known = set(tensors)
    return Coverage(
        covered=tuple(name for name in tensors if name in cache.scales),
        missing=tuple(name for name in tensors if name not in cache.scales),
        zero=tuple(name for name, scale in cache.scales.items() if scale == 0),
        foreign=tuple(name for name in cache.scales if name not in known),
    )


def network_tensors(inputs: Sequence[NetworkInput], layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """The float tensors of a network, which are those that int8 needs a range for: inputs and outputs of layers, the
    latter as mappings with "outputs" and "output_dtypes"."""
    found = [(one.name, one.dtype) for one in inputs]
    for layer in layers:
        found += zip(layer["outputs"], layer["output_dtypes"], strict=True)
    return [name for name, dtype in found if dtype in ("float32", "float16", "bfloat16")]


def check_calls(calls: int, *, batches: int, cached: str | os.PathLike[str] | None) -> None:
    """Whether TensorRT asked the calibrator for data (`calls` times) exactly when it should have.

    With the cache `cached` it asks for none, unless it rejected the cache: `CalibrationCacheError`. Without one it asks
    for every batch, unless it left the calibrator out: `EngineBuildError`.
    """
    if cached is not None and calls:
        raise _distrust(
            Path(cached),
            f"TensorRT rejected it and asked for data {calls} times.",
            "rejected by TensorRT",
            "accepted by TensorRT",
        )
    if cached is None and calls < batches:
        raise EngineBuildError(
            f"TensorRT asked the calibrator for {calls} of {batches} batches, so the plan is not calibrated with this "
            "data set. A network with Q/DQ nodes or with ranges of its own takes no calibrator."
        )


_WITHOUT_RANGE = re.compile(
    r"Missing scale and zero-point for tensor (?P<missing>.+?)(?:, expect fall back|\. Tensor scale|$)"
    r"|default quantization params because quantization data is missing for (?P<made_up>.+?)\.?$",
    re.MULTILINE,
)


def check_log(
    lines: Iterable[str | tuple[int, str]], tensors: Collection[str], allowed: float = ALLOWED_WITHOUT_RANGE
) -> dict[str, list[str]]:
    """Tensors that TensorRT's log calls without a range: ``{"missing": [...], "made_up": [...]}``, for the manifest.

    Raises `EngineBuildError` when they are more than the part `allowed` of the network's `tensors`: such a plan runs
    mostly in another precision, or with ranges that TensorRT made up.
    """
    named: dict[str, list[str]] = {"missing": [], "made_up": []}
    for line in lines:
        for match in _WITHOUT_RANGE.finditer(line if isinstance(line, str) else line[1]):
            named[match.lastgroup or "missing"].append(match[match.lastgroup or 0])
    named = {kind: sorted(set(names)) for kind, names in named.items()}
    without = {name for names in named.values() for name in names} & set(tensors)
    if tensors and len(without) > allowed * len(tensors):
        raise EngineBuildError(
            f"{len(without)} of {len(tensors)} tensors have no int8 range ({100 * len(without) / len(tensors):.0f} %; "
            f"{100 * allowed:g} % may), e.g. {', '.join(sorted(without)[:3])}. Their layers do not run in int8, or "
            "with ranges that TensorRT made up. Build with --recalibrate; for transformers prefer a model with Q/DQ "
            "nodes.",
        )
    return named
