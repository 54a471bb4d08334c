"""JSON from a file that may be damaged or hostile, read into frozen dataclasses by their annotations.

`parse` reads text and marks what JSON or its readers disagree about: NaN, keys given twice, numbers without end.
`reader` turns the type of a field into a function that checks a value; an `InvalidError` collects the JSON pointer of
the place on its way up.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

#: Any JSON value.
Json = Any

_DEEPEST = 64
_LONGEST_INT = 18  # digits: every such number fits 64 bits


class InvalidError(Exception):
    """A value that is not what it should be; `pointer` says where it stands (RFC 6901)."""

    def __init__(self, problem: str, *place: str) -> None:
        super().__init__(problem)
        self.place = list(place)

    def at(self, key: str | int) -> InvalidError:
        self.place.insert(0, str(key))
        return self

    @property
    def pointer(self) -> str:
        return "".join("/" + _in_message(key.replace("~", "~0").replace("/", "~1")) for key in self.place)


@dataclass(frozen=True)
class Rule:
    """What a value must be beyond its type: a pattern for the whole string, or bounds for a number."""

    text: str
    pattern: str | None = None
    least: int | None = None

    def holds(self, value: Any) -> bool:
        if self.pattern is not None:
            return _compiled(self.pattern).fullmatch(value) is not None
        return self.least is None or bool(value >= self.least)


_compiled = functools.cache(re.compile)


class _Bad:
    """Stands in parsed JSON for something that is not to be used; only its place has to be found still."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


def parse(data: bytes) -> Json:
    """Raises `InvalidError`. The result may hold `_Bad` values, which every reader refuses."""
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidError(f"no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise InvalidError(f"nested more than {_DEEPEST} deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                result[key] = _Bad("the key is given twice")
            seen.add(key)
    return result


def _int(text: str) -> int | _Bad:
    return int(text) if len(text.lstrip("-")) <= _LONGEST_INT else _Bad(f"a number of {len(text)} digits")


def _float(text: str) -> float | _Bad:
    value = float(text)
    return value if math.isfinite(value) else _Bad("a number beyond the range of a double")


def _constant(text: str) -> _Bad:
    return _Bad(f"{text} is no JSON")


def _in_message(text: str) -> str:
    text = text if text.isprintable() else json.dumps(text)[1:-1]
    return text if len(text) <= 80 else text[:79] + "…"


def shown(value: Any) -> str:
    """A value in a message: short, on one line, without control characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return _in_message(text)


# ------------------------------------------------------------------------------------------------ readers of values

Reader = Callable[[Any], Any]


@functools.cache
def reader(kind: Any) -> Reader:
    """The function that checks a value against an annotation and returns it, or raises `InvalidError`."""
    if kind is Any:
        return _any
    if is_dataclass(kind):
        return functools.partial(_record, kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return functools.partial(_ruled, reader(arguments[0]), arguments[1])
    if origin is Literal:
        return functools.partial(_one_of, arguments)
    if origin in (Union, types.UnionType):
        (other,) = (a for a in arguments if a is not type(None))
        return functools.partial(_optional, reader(other))
    if origin is tuple:
        return functools.partial(_list, reader(arguments[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping
    names = {str: "a string", bool: "true or false", int: "a whole number", float: "a finite number"}
    return functools.partial(_scalar, kind, names[kind])


def _any(value: Any, depth: int = 0) -> Any:
    # Values that other modules own: only what no JSON may hold is refused.
    if isinstance(value, str):
        return _scalar(str, "a string", value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return _scalar(float, "a finite number", value)
    items: Any = ()
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif isinstance(value, Mapping):
        for key in value:
            _scalar(str, "a string, as every key must be", key)
        items = value.items()
    else:
        raise _not("a JSON value", value)
    if depth >= _DEEPEST:
        raise InvalidError(f"nested more than {_DEEPEST} deep")
    for key, item in items:
        try:
            _any(item, depth + 1)
        except InvalidError as error:
            raise error.at(key) from None
    return value


def _not(what: str, value: Any) -> InvalidError:
    return InvalidError(value.problem if isinstance(value, _Bad) else f"{shown(value)} is not {what}")


def _scalar(kind: type, name: str, value: Any) -> Any:
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right or (kind is float and not math.isfinite(value)):
        raise _not(name, value)
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidError(f"{shown(value)} holds half a character (a lone surrogate)") from None
    return value


def _ruled(read: Reader, rule: Rule, value: Any) -> Any:
    value = read(value)
    if not rule.holds(value):
        raise _not(rule.text, value)
    return value


def _one_of(allowed: tuple[str, ...], value: Any) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise _not(f"one of {', '.join(map(shown, allowed))}", value)
    return value


def _optional(read: Reader, value: Any) -> Any:
    return None if value is None else read(value)


def _list(read: Reader, value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _not("a list", value)
    result = []
    for i, item in enumerate(value):
        try:
            result.append(read(item))
        except InvalidError as error:
            raise error.at(i) from None
    return tuple(result)


def _mapping(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _not("an object", value)
    return _any(value)


@functools.cache
def _readers(kind: Any) -> dict[str, Reader]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: reader(hints[field.name]) for field in fields(kind)}


def _record(kind: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _not("an object", value)
    readers = _readers(kind)
    for key in value:
        if key not in readers:
            raise InvalidError(f"unknown key; known: {', '.join(readers)}", key)
    result = {}
    for key, read in readers.items():
        if key not in value:
            raise InvalidError("the key is missing", key)
        try:
            result[key] = read(value[key])
        except InvalidError as error:
            raise error.at(key) from None
    return kind(**result)


def plain(value: Any) -> Json:
    """Dataclasses and tuples as dicts and lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
