"""What an output may differ from the reference by, for each precision and each output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..errors import BuildOptionError

__all__ = ["Limits", "Thresholds"]


@dataclass(frozen=True)
class Limits:
    """What one output may differ by. A limit that is None is not applied."""

    cosine: float | None = None  # at least
    max_rel: float | None = None  # these at most, defined above
    max_abs: float | None = None
    mean_abs: float | None = None
    to_peak: float | None = None
    #: An error up to this is rounding whatever it is relative to: it widens the limits on cosine and max_rel of outputs
    #: that are not much larger, and those alone.
    absolute: float = 0.0
    #: Share of the elements of an integer or bool output that may differ.
    differing: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            lifted = value is None and name not in ("absolute", "differing")
            if not lifted and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}; allowed: a number from 0")


# Where the numbers come from:
# fp32: rtol 1e-3 is what ONNX's own backend tests allow. They add atol 1e-7; 1e-6 is 8 units in the last place of 1,
#   which is what the tail of a sigmoid is made of.
# bf16, fp8: the cosines are those that NVIDIA's Isaac-GR00T demands of a backbone in these types
#   (scripts/deployment/accuracy_thresholds.py). fp16 and tf32 (11 bits of a product's factors) are held to bf16's.
# max_rel: in the tail of a sigmoid or softmax it is the error of the logit. PP-OCR v4 (detection and recognition, noise
#   and drawn boxes) with every tensor in it rounded to fp16 has cosines from 0.9993 and max_rel up to 0.48; with every
#   tensor rounded to bf16, max_rel up to 1.2 where the cosine holds. An element that is 0 and should not be has
#   0.5 and more, one that should be 0 and is not, or has the wrong sign, 1 and more.
# int8: as fp8; what it costs beyond that is calibration.
_DEFAULTS = {
    "fp32": Limits(cosine=0.99999, max_rel=1e-3, absolute=1e-6),
    "tf32": Limits(cosine=0.999, max_rel=0.5, absolute=1e-6),
    "fp16": Limits(cosine=0.999, max_rel=0.5, absolute=1e-6),
    "bf16": Limits(cosine=0.999, max_rel=1.2, absolute=1e-6),
    "int8": Limits(cosine=0.99, max_rel=3.0, absolute=1e-6),
    "fp8": Limits(cosine=0.99, max_rel=3.0, absolute=1e-6),
}
_DEFAULTS["mixed"] = _DEFAULTS["bf16"]


@dataclass(frozen=True)
class Thresholds:
    """Limits for every output: those of the precision, and changes for outputs by name.

    Limits that let rounding pass let some wrong elements pass with it, the more the shorter the type. A plan of the
    same model in fp32 is held to limits that only rounding in fp32 meets: it shows whether every operator is right.
    """

    precision: str
    default: Limits
    outputs: Mapping[str, Limits] = field(default_factory=dict)

    @classmethod
    def of(cls, precision: str, changes: Mapping[str, Mapping[str, float | None]] | None = None) -> Thresholds:
        """`changes`: output name (or "*" for all) -> limit name -> value.

        Raises `BuildOptionError` for a precision or a limit that does not exist, or a value that makes no sense.
        """
        if precision not in _DEFAULTS:
            raise refused(f"no limits are known for precision {precision!r}", precision, ", ".join(_DEFAULTS))
        default = _DEFAULTS[precision]
        changes = dict(changes or {})
        names = [f.name for f in fields(Limits)]

        def changed(limits: Limits, output: str) -> Limits:
            for name in changes[output]:
                if name not in names:
                    raise refused(f"{output!r} names no limit", name, ", ".join(names))
            try:
                return replace(limits, **changes[output])  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                raise refused(f"{output!r}: {error}", str(changes[output]), "numbers from 0") from error

        if "*" in changes:
            default = changed(default, "*")
            del changes["*"]
        return cls(precision, default, {output: changed(default, output) for output in changes})

    @classmethod
    def parse(cls, precision: str, texts: Sequence[str]) -> Thresholds:
        """From a command line: "OUTPUT:cosine=0.99,max_rel=0.2", or without "OUTPUT:" for all. "none" lifts a limit."""
        changes: dict[str, dict[str, float | None]] = {}
        for text in texts:
            output, _, limits = text.rpartition(":")
            for part in limits.split(","):
                name, _, value = part.partition("=")
                try:
                    number = None if value == "none" else float(value)
                except ValueError:
                    raise refused(f"{text!r} is no limit", part, "[OUTPUT:]NAME=NUMBER,…") from None
                changes.setdefault(output or "*", {})[name.strip()] = number
        return cls.of(precision, changes)

    def for_output(self, name: str) -> Limits:
        return self.outputs.get(name, self.default)

    def to_mapping(self) -> dict[str, Any]:
        outputs = {name: asdict(limits) for name, limits in self.outputs.items()}
        return {"precision": self.precision, "default": asdict(self.default), "outputs": outputs}

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Thresholds:
        """Raises `ValueError`."""
        try:
            outputs = {name: Limits(**limits) for name, limits in data["outputs"].items()}
            return cls(str(data["precision"]), Limits(**data["default"]), outputs)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"thresholds: {error!r}") from error


def refused(why: str, found: str, allowed: str) -> BuildOptionError:
    return BuildOptionError(
        f"--parity-limit: {why}; found: {found}; allowed: {allowed}. Correct it or leave it out.",
        option="--parity-limit",
        found=found,
        allowed=allowed,
    )
