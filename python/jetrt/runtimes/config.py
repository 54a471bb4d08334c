"""Which runtime a program uses, from a mapping, a TOML file or the environment, as one checked record.

    [runtime]
    name = "tensorrt"
    allowed = ["tensorrt", "pytorch_fp16"]    # what this program may run on at all
    fallback = []                             # nothing; otherwise what to take, in this order, when `name` is missing
    consumers = ["c2_vpr", "c3_matcher"]      # who needs it, for messages
    precision = "fp16"                        # this and the next three: what compile_engine builds by default
    workspace_mb = 1024
    calibration_dataset = "calibration.npz"   # relative to this file
    optimization_profiles = [{ input = "x", min = [1, 64], opt = [8, 64], max = [64, 64] }]

    [runtime.tensorrt]                        # options of the models, one table for each runtime
    max_contexts = 4

    [runtime.build_flags]                     # on top of the environment's
    BUILD_ONNX_CPU_RUNTIME = false

A key that is unknown, or has a value of the wrong type, is refused with its place.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, get_args

from ..errors import RuntimeConfigError
from ..runtime import RUNTIMES, BuildConfig, Precision

__all__ = ["OPTIONS", "RuntimeConfig", "build_flag", "flag_is_on", "narrowed", "read_config"]

#: Variables of the environment beside the BUILD_* flags, and the keys that they give.
VARIABLES: Final = {
    "JETRT_RUNTIME": "name",
    "JETRT_RUNTIME_ALLOWED": "allowed",
    "JETRT_RUNTIME_FALLBACK": "fallback",
    "JETRT_RUNTIME_CONSUMERS": "consumers",
    "JETRT_RUNTIME_PRECISION": "precision",
    "JETRT_RUNTIME_WORKSPACE_MB": "workspace_mb",
    "JETRT_RUNTIME_CALIBRATION_DATASET": "calibration_dataset",
}
#: Names a TOML file; the variables above count more than what it says.
CONFIG_VARIABLE: Final = "JETRT_RUNTIME_CONFIG"

_STRIDED = ("error", "copy")
_CAST = ("error", "cast")

#: Options of each runtime's models that a configuration can give: a type, a list of one type, or the allowed words.
#: What `BuildConfig` says (precision, profiles, workspace) is not repeated here.
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "tensorrt": {
        "device": int,
        "graphs": ("auto", "off", "require"),
        "outputs": ("pooled", "fresh"),
        "on_strided": _STRIDED,
        "on_dtype": _CAST,
        "host": ("auto", "mapped", "staged", "error"),
        "profile": ("auto", int),
        "max_contexts": int,
        "timeout": float,
        "plugins": [str],
        "allow_host_code": bool,
        "verify": ("auto", "off"),
        "warmup": int,
        "graph_bytes": int,
        "refit": str,
        "weight_streaming_budget": int,
    },
    "onnx_trt_ep": {
        "device": int,
        "calibration_table": str,
        "allow_partition": bool,
        "cache_dir": str,
        "on_strided": _STRIDED,
        "on_dtype": _CAST,
    },
    "pytorch_fp16": {
        "device": str,
        "autocast_dtype": ("float16", "bfloat16", "float32"),
        "output_names": [str],
    },
    "torch_tensorrt": {
        "device": str,
        "autocast_dtype": ("float16", "bfloat16", "float32"),
        "output_names": [str],
        "allow_partition": bool,
    },
    "onnx_cpu": {"threads": int, "on_strided": _STRIDED, "on_dtype": _CAST},
    "openvino_cpu": {"threads": int, "on_strided": _STRIDED, "on_dtype": _CAST},
}


@dataclass(frozen=True)
class RuntimeConfig:
    """A checked configuration."""

    name: str
    #: Runtimes that may be used at all; ``None``: every one.
    allowed: tuple[str, ...] | None = None
    #: Runtimes to take, in this order, where `name` cannot be had.
    fallback: tuple[str, ...] = ()
    #: Parts of the program that need the runtime.
    consumers: tuple[str, ...] = ()
    #: What `compile_engine` builds when it is given nothing.
    build: BuildConfig | None = None
    #: Keyword arguments of the models, for each runtime.
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: BUILD_* flags that count more than the environment's.
    flags: Mapping[str, bool] = field(default_factory=dict)

    def key(self) -> str:
        """Equal for configurations that give the same runtime object; who consumes it makes no difference."""
        parts = [
            self.name,
            self.allowed,
            self.fallback,
            repr(self.build),
            {k: dict(v) for k, v in self.options.items()},
            self.flags,
        ]
        return json.dumps(parts, sort_keys=True, default=repr)


def narrowed(
    config: RuntimeConfig,
    allowed: Sequence[str] | None,
    fallback: Sequence[str] | None,
    consumers: Sequence[str] | None,
) -> RuntimeConfig:
    """The configuration with what a program adds to it. `allowed` can only take away."""
    permitted = config.allowed
    if allowed is not None:
        asked = _runtimes("allowed=", allowed)
        permitted = asked if permitted is None else tuple(name for name in permitted if name in asked)
    others = config.fallback if fallback is None else _runtimes("fallback=", fallback)
    for name in others:
        if permitted is not None and name not in permitted:
            raise _wrong("fallback=" if fallback is not None else "fallback", name, ", ".join(permitted) or "none")
    names = config.consumers if consumers is None else _words("consumers=", consumers, "names")
    return replace(config, allowed=permitted, fallback=others, consumers=names)


# ------------------------------------------------------------------------------------------------------ BUILD_* flags


def build_flag(runtime: str) -> str:
    """The flag that gates a runtime: BUILD_TENSORRT_RUNTIME for "tensorrt"."""
    return f"BUILD_{runtime.upper()}_RUNTIME"


_ON, _OFF = ("on", "1", "true", "yes"), ("off", "0", "false", "no")


def flag_is_on(runtime: str, flags: Mapping[str, bool]) -> bool:
    """Whether the runtime may be used: by its flag in the configuration, then in the environment; otherwise yes."""
    flag = build_flag(runtime)
    if flag in flags:
        return flags[flag]
    return flag not in os.environ or _switch(f"environment: {flag}", os.environ[flag])


def _switch(place: str, text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_ON, *_OFF):
        raise _wrong(place, text, "ON or OFF (1/0, true/false, yes/no)")
    return word in _ON


# ------------------------------------------------------------------------------------------------------------ reading


def read_config(source: Mapping[str, Any] | str | os.PathLike[str] | RuntimeConfig | None = None) -> RuntimeConfig:
    """A configuration from a mapping, a TOML file, or (``None``) the environment.

    A mapping is the table itself, or has it under "runtime" as the file does. Raises `RuntimeConfigError`.
    """
    if isinstance(source, RuntimeConfig):
        return source
    if source is None:
        return _from_environment(os.environ)
    if isinstance(source, Mapping):
        table = source.get("runtime")
        if isinstance(table, Mapping):
            return _checked("config: [runtime]", table, None)
        return _checked("config: [runtime]", source, None)
    path = Path(source)
    return _checked(f"{path}: [runtime]", _toml(path), path.parent)


def _toml(path: Path) -> Mapping[str, Any]:
    content = path.read_bytes()  # a missing file is a FileNotFoundError
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise RuntimeConfigError(
                f"{path}: Python {sys.version_info[0]}.{sys.version_info[1]} reads no TOML by itself. Install the "
                "package tomli (pip install tomli), or give the configuration as a mapping or in the environment.",
                key=str(path),
            ) from error
    try:
        document = tomllib.loads(content.decode())
    except ValueError as error:  # also what is no UTF-8
        raise RuntimeConfigError(f"{path} is no TOML: {error}.", key=str(path)) from error
    table = document.get("runtime")
    if not isinstance(table, dict):
        found = f"tables {', '.join(document)}" if document else "an empty file"
        raise _wrong(f"{path}: [runtime]", found if table is None else table, "a table of that name")
    return table


def _from_environment(environment: Mapping[str, str]) -> RuntimeConfig:
    known = (*VARIABLES, CONFIG_VARIABLE)
    for variable in environment:
        if variable.startswith("JETRT_RUNTIME") and variable not in known:
            raise _unknown(f"environment: {variable}", variable, known, what="variable")
    table: dict[str, Any] = {}
    base, place = None, "environment"
    if environment.get(CONFIG_VARIABLE):
        path = Path(environment[CONFIG_VARIABLE])
        table.update(_toml(path))
        base, place = path.parent, f"{path}: [runtime]"
    places = {}
    for variable, key in VARIABLES.items():
        if variable not in environment:
            continue
        text = environment[variable].strip()
        places[key] = f"environment: {variable}"
        if key in ("allowed", "fallback", "consumers"):
            table[key] = [word.strip() for word in text.split(",") if word.strip()]
        elif key == "workspace_mb":
            table[key] = int(text) if text.isascii() and text.isdigit() else text
        else:
            table[key] = str(Path(text).absolute()) if key == "calibration_dataset" else text
    if "name" not in table:
        raise RuntimeConfigError(
            f"No runtime is configured: set JETRT_RUNTIME to one of {', '.join(RUNTIMES)}, or {CONFIG_VARIABLE} to a "
            "TOML file with a table [runtime]. None is taken by itself.",
            key="environment: JETRT_RUNTIME",
            allowed=list(RUNTIMES),
        )
    return _checked(place, table, base, places)


# ----------------------------------------------------------------------------------------------------------- checking


def _checked(
    place: str, table: Mapping[str, Any], base: Path | None, places: Mapping[str, str] | None = None
) -> RuntimeConfig:
    def at(key: str) -> str:
        return (places or {}).get(key, f"{place}.{key}")

    readers: dict[str, Callable[[str, Any], Any]] = {
        "name": _runtime,
        "allowed": _runtimes,
        "fallback": _runtimes,
        "consumers": lambda where, value: _words(where, value, "names"),
        "precision": lambda where, value: _word(where, value, get_args(Precision)),
        "workspace_mb": _size,
        "calibration_dataset": lambda where, value: _path(where, value, base),
        "optimization_profiles": _profiles,
        "build_flags": _flags,
        **dict.fromkeys(RUNTIMES, _mapping),
    }
    for key in table:
        if key not in readers:
            raise _unknown(f"{place}.{key}", str(key), tuple(readers))
    values = {key: readers[key](at(key), value) for key, value in table.items()}
    if "name" not in values:
        raise RuntimeConfigError(
            f"{place}.name: missing; allowed: {', '.join(RUNTIMES)}. No runtime is taken by itself.",
            key=f"{place}.name",
            allowed=list(RUNTIMES),
        )
    for runtime in RUNTIMES:
        if runtime in values:
            values[runtime] = _options(at(runtime), runtime, values[runtime], base)
    allowed: tuple[str, ...] | None = values.get("allowed")
    for name in values.get("fallback", ()):
        if name == values["name"]:
            raise _wrong(at("fallback"), name, "other runtimes than the one that it stands in for")
        if allowed is not None and name not in allowed:
            raise _wrong(at("fallback"), name, f"runtimes that {at('allowed')} has: {', '.join(allowed) or 'none'}")
    build = {
        key: values[key]
        for key in ("precision", "workspace_mb", "calibration_dataset", "optimization_profiles")
        if key in values
    }
    try:
        made = BuildConfig(**build) if build else None
    except ValueError as error:
        raise RuntimeConfigError(f"{place}: {error}", key=place) from error
    return RuntimeConfig(
        name=values["name"],
        allowed=allowed,
        fallback=values.get("fallback", ()),
        consumers=values.get("consumers", ()),
        build=made,
        options={runtime: values[runtime] for runtime in RUNTIMES if runtime in values},
        flags=values.get("build_flags", {}),
    )


def _wrong(place: str, found: Any, allowed: str) -> RuntimeConfigError:
    shown = found if isinstance(found, str) and found.startswith(("tables ", "an empty")) else repr(found)
    return RuntimeConfigError(f"{place}: found {shown}; allowed: {allowed}.", key=place, found=found, allowed=allowed)


def _unknown(place: str, key: str, allowed: Sequence[str], what: str = "key") -> RuntimeConfigError:
    near = ["name"] if key == "runtime" else difflib.get_close_matches(key, allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return RuntimeConfigError(
        f"{place}: unknown {what}; allowed: {', '.join(allowed)}{hint}", key=place, found=key, allowed=list(allowed)
    )


def _word(place: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise _wrong(place, value, ", ".join(allowed))
    return value


def _words(place: str, value: Any, what: str) -> tuple[str, ...]:
    # A single string would be taken apart into letters.
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) and v for v in value):
        raise _wrong(place, value, f"a list of {what}")
    return tuple(value)


def _runtime(place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(place, value, ", ".join(RUNTIMES))
    return value  # a name that nobody knows is told by the choice, with what is available


def _runtimes(place: str, value: Any) -> tuple[str, ...]:
    names = _words(place, value, "runtimes")
    for name in names:
        if name not in RUNTIMES:
            near = difflib.get_close_matches(name, RUNTIMES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise _wrong(place, name, ", ".join(RUNTIMES) + hint)
    return names


def _size(place: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _wrong(place, value, "a whole number of MiB above 0")
    return value


def _path(place: str, value: Any, base: Path | None) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise _wrong(place, value, "a path")
    return Path(value) if base is None else base / value


def _mapping(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(place, value, "a table")
    return value


def _flags(place: str, value: Any) -> dict[str, bool]:
    known = [build_flag(runtime) for runtime in RUNTIMES]
    flags = {}
    for flag, state in _mapping(place, value).items():
        if flag not in known:
            raise _unknown(f"{place}.{flag}", str(flag), known)
        if isinstance(state, bool):
            flags[flag] = state
        elif isinstance(state, str):
            flags[flag] = _switch(f"{place}.{flag}", state)
        else:
            raise _wrong(f"{place}.{flag}", state, "true or false")
    return flags


def _profiles(place: str, value: Any) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]:
    """Rows of (input, min, opt, max), each as a list or as a table."""
    wanted = "a list of {input, min, opt, max}"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(place, value, wanted)
    rows = []
    for index, row in enumerate(value):
        where = f"{place}[{index}]"
        if isinstance(row, Mapping):
            for key in row:
                if key not in ("input", "min", "opt", "max"):
                    raise _unknown(f"{where}.{key}", str(key), ("input", "min", "opt", "max"))
            parts = [row.get(key) for key in ("input", "min", "opt", "max")]
        elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 4:
            parts = list(row)
        else:
            raise _wrong(where, row, wanted)
        name, *shapes = parts
        if not isinstance(name, str):
            raise _wrong(f"{where}.input", name, "the name of an input")
        for bound, shape in zip(("min", "opt", "max"), shapes, strict=True):
            if isinstance(shape, str) or not isinstance(shape, Sequence) or not all(type(n) is int for n in shape):
                raise _wrong(f"{where}.{bound}", shape, "a list of whole numbers")
        rows.append((name, *(tuple(shape or ()) for shape in shapes)))
    return tuple(rows)  # type: ignore[arg-type]


def _options(place: str, runtime: str, table: Mapping[str, Any], base: Path | None) -> dict[str, Any]:
    known = OPTIONS[runtime]
    options = {}
    for key, value in table.items():
        where = f"{place}.{key}"
        if key not in known:
            raise _unknown(where, str(key), tuple(known))
        if not _fits(value, known[key]):
            raise _wrong(where, value, _spelled(known[key]))
        if base is not None and key in ("cache_dir", "calibration_table", "refit"):
            value = str(base / value)
        options[key] = tuple(value) if isinstance(known[key], list) else value
    return options


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return any(value == word if isinstance(word, str) else _fits(value, word) for word in kind)
    if isinstance(kind, list):
        return isinstance(value, (list, tuple)) and all(_fits(each, kind[0]) for each in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind or (kind is str and isinstance(value, os.PathLike))


_SPELLED = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _spelled(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(repr(word) if isinstance(word, str) else _SPELLED[word] for word in kind)
    if isinstance(kind, list):
        return f"a list, each of it {_SPELLED[kind[0]]}"
    return _SPELLED[kind]
