"""How values of build options are read, from the command line, TOML, JSON and Python alike, and written back."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .hints import Bound, did_you_mean

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """`read` gives the value as it is kept, or raises ValueError with what is allowed; `written` gives the word that
    the command line takes."""

    read: Callable[[Any], Any]
    written: Callable[[Any], str] = str
    metavar: str | None = None
    many: bool = False


def _text(value: Any) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("a text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def whole(low: int, high: int = _MOST) -> Kind:
    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value):
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low}" + (f" to {high}" if high < _MOST else ""))
        return value

    return Kind(read, metavar="N")


def choice(*allowed: str) -> Kind:
    def read(value: Any) -> str:
        if value not in allowed:
            near = did_you_mean(value, allowed) if isinstance(value, str) else ""
            raise ValueError(", ".join(allowed) + f".{near}" * bool(near))
        return str(value)

    return Kind(read, metavar="|".join(allowed))


def _size(value: Any) -> int:
    allowed = "a size such as 512M or 2G; a number alone is MiB, as in the scripts"
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,18})\s*(?:(B)|([KMGT])(?:i?B)?)?", value.strip(), re.I)
        if match is None:
            raise ValueError(allowed)
        value = int(match[1]) << (0 if match[2] else 10 * (1 + "KMGT".index((match[3] or "M").upper())))
    if type(value) is not int or not 0 < value < 2**63:
        raise ValueError(allowed)
    return value


def _written_size(value: int) -> str:
    return f"{value}B" if value % (1 << 20) else f"{value >> 20}M"


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,12}(?:\.\d*)?(?:e[-+]?\d{1,3})?)\s*([smh]?)", value.strip())
        value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError("seconds above 0, or a number with s, m or h")
    return float(value)


def _percent(value: Any) -> float:
    allowed = "a share such as 95%, above 0% and up to 100%"
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,3}(?:\.\d*)?(?:e-\d{1,3})?)\s*(%?)", value.strip())
        if match and not match[2] and float(match[1]) <= 1:
            raise ValueError(f"{allowed}; with the sign where it is 1 or less, since 0.95 may be meant as 95%")
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 100:
        raise ValueError(allowed)
    return float(value)


def _level(value: Any) -> int | str:
    try:
        return "auto" if value == "auto" else int(whole(0, 5).read(value))
    except ValueError:
        raise ValueError("0 to 5, or auto") from None


def _levels(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        span = re.fullmatch(r"([0-5])-([0-5])", value)
        value = range(int(span[1]), int(span[2]) + 1) if span else value.split(",")
    try:
        levels = tuple(sorted({whole(0, 5).read(level) for level in value}))
    except (TypeError, ValueError):
        levels = ()
    if not levels:
        raise ValueError("levels from 0 to 5, as 2-5 or 2,3,5")
    return levels


def texts(read_one: Callable[[Any], str], metavar: str, separator: str = "") -> Kind:
    """Several texts. `separator` may stand between them within one word."""

    def read(value: Any) -> tuple[str, ...]:
        parts = [value] if isinstance(value, (str, os.PathLike, Mapping)) else value
        if not isinstance(parts, Iterable):
            raise ValueError("a list of texts")
        words: list[Any] = []
        for part in parts:
            words += part.split(separator) if separator and isinstance(part, str) else [part]
        return tuple(read_one(word) for word in words)

    return Kind(read, metavar=metavar, many=True)


def bound(flag: str) -> Kind:
    """One `Bound` for each profile, as text."""
    return texts(
        lambda value: str(Bound.parse(value if isinstance(value, Mapping) else _text(value), flag)), "NAME:SHAPE"
    )


def enum_name(value: Any) -> str:
    """CUBLAS_LT for cublas_lt and kCUBLAS_LT."""
    name = _text(value).strip()
    if not re.fullmatch(r"\w+", name):
        raise ValueError("names of TensorRT's enumeration, such as CUBLAS_LT")
    return (name[1:] if re.match("k[A-Z]", name) else name).upper()


def _tactic_sources(value: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = texts(enum_name, "", ",").read(value)
    return () if names == ("NONE",) else names


def _setting(value: Any) -> str:
    """``STRICT_NANS=on`` for a flag, ``max_nb_tactics=3`` for a setting with a value."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:=\s*(\w+)\s*)?", _text(value))
    if match is None:
        raise ValueError("FLAG, FLAG=off or SETTING=VALUE")
    state = {None: "on", "true": "on", "false": "off"}.get(match[2] and match[2].lower(), match[2] or "on").lower()
    return f"{enum_name(match[1]) if state in ('on', 'off') else match[1].lower()}={state}"


def _pattern(value: Any) -> str:
    pattern = _text(value).strip()
    if "," in pattern or not pattern:
        raise ValueError("shell patterns of layer or tensor names; commas separate them, ? stands for one character")
    return pattern


TEXT = Kind(_text, metavar="TEXT")
PATH = Kind(_text, metavar="PATH")
FLAG = Kind(_flag)
SIZE = Kind(_size, _written_size, "SIZE")
SECONDS = Kind(_seconds, lambda value: repr(float(value)), "SECONDS")
PERCENT = Kind(_percent, lambda value: f"{float(value)!r}%", "PERCENT")
LEVEL = Kind(_level, metavar="0-5|auto")
LEVELS = Kind(_levels, lambda value: ",".join(map(str, value)), "2-5")
PATHS = texts(_text, "PATH")
TEXTS = texts(_text, "TEXT")
PATTERNS = texts(_pattern, "PATTERN", ",")
SETTINGS = texts(_setting, "FLAG[=off]")
TACTIC_SOURCES = Kind(_tactic_sources, metavar="NAME", many=True)
