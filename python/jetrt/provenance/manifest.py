"""The manifest of a plan, `<plan>.json`: what it was made from, with what, for which machine, and how exact it is.

Its published form is `jetrt/schemas/manifest.json` (JSON Schema 2020-12); a test keeps the two alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from .. import platform
from ..errors import ManifestError
from ._json import InvalidError, Json, Rule, parse, plain, reader, shown
from .names import read_regular, sha256_of

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA: Final = "jetrt-manifest-1"
#: Bytes; a larger file is refused before it is read.
LARGEST = 16 << 20

# Patterns match the whole string. The schema has the same ones.
_CONTROL = "\\u0000-\\u001f\\u007f-\\u009f"
_COMPONENT = f"(?!\\.{{1,2}}(?:/|$))[^/\\\\{_CONTROL}]+"
Sha256 = Annotated[str, Rule("64 lower-case hex digits", "[0-9a-f]{64}")]
Line = Annotated[str, Rule("text without control characters", f"[^{_CONTROL}]*")]
#: Names from a manifest are joined to a folder; they must not lead out of it.
FileName = Annotated[str, Rule("a file name without a folder", _COMPONENT)]
RelativeName = Annotated[str, Rule("a relative path without '..'", f"{_COMPONENT}(?:/{_COMPONENT})*")]
Version = Annotated[str, Rule("a version of numbers and dots", "[0-9]{1,9}(?:\\.[0-9]{1,9}){0,3}")]
Time = Annotated[str, Rule("a time as 2026-01-31T12:00:00Z", "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")]
Count = Annotated[int, Rule("0 or more", least=0)]
Positive = Annotated[int, Rule("1 or more", least=1)]
Dimension = Annotated[int, Rule("-1 (dynamic) or more", least=-1)]
Seconds = Annotated[float, Rule("0 or more", least=0)]


@dataclass(frozen=True)
class FileHash:
    """A file beside the model, such as external weights; `file` is relative to the model's folder."""

    file: RelativeName
    sha256: Sha256
    bytes: Count


@dataclass(frozen=True)
class EngineFile:
    file: FileName
    sha256: Sha256
    bytes: Count

    @classmethod
    def of(cls, path: str | os.PathLike[str], file: str | None = None) -> Self:
        """Hashes a plan that is to be called `file`."""
        path = Path(path)
        return cls(file or path.name, sha256_of(path), path.stat().st_size)


@dataclass(frozen=True)
class ModelFile:
    """The ONNX model; `sha256` covers its external data too."""

    file: FileName
    sha256: Sha256
    files: tuple[FileHash, ...]
    opset: Count | None
    producer: str | None


@dataclass(frozen=True)
class Machine:
    """Where a plan was built, or where it is to run. ``None`` is unknown, never "none"."""

    #: As the library says it, "10.6.0.26".
    tensorrt: Version
    #: The CUDA version of the driver.
    cuda: Line | None
    driver: Line | None
    #: 87 for compute capability 8.7.
    sm: Positive
    #: What CUDA sees: a lower power mode of a Jetson switches SMs off.
    sm_count: Positive
    gpu: Line
    #: "aarch64", "x86_64".
    arch: Line
    l4t: Line | None
    jetpack: Line | None
    power_mode: Line | None
    #: Total memory of the GPU.
    memory_bytes: Count

    @classmethod
    def here(
        cls,
        device: int = 0,
        *,
        core: Callable[[int], Mapping[str, Any]] | None = None,
        root: str | os.PathLike[str] = "/",
    ) -> Self:
        """This machine. `core` gives what CUDA and TensorRT say about the GPU, files under `root` give the rest.

        Raises what opening TensorRT and the driver raises.
        """
        if core is None:
            from .. import _core

            core = _core._machine  # type: ignore[attr-defined,unused-ignore]
        gpu = core(device)
        system = platform.identify(root)
        return cls(
            tensorrt=gpu["tensorrt"],
            cuda=gpu["cuda"],
            driver=gpu.get("driver") or system.driver,
            sm=gpu["sm"],
            sm_count=gpu["sm_count"],
            gpu=gpu["gpu"],
            arch=system.arch,
            l4t=system.l4t,
            jetpack=system.jetpack,
            power_mode=system.power_mode,
            memory_bytes=gpu["memory_bytes"],
        )


@dataclass(frozen=True)
class Tensor:
    """An input or output; -1 is a dynamic dimension."""

    name: str
    dtype: Line
    shape: tuple[Dimension, ...]
    location: Literal["device", "host"]
    format: Line


@dataclass(frozen=True)
class BuildReport:
    seconds: Seconds
    #: Phases of the build as the builder reported them.
    phases: Json
    #: The optimisation level that was used.
    level: Count | None
    peak_host_bytes: Count | None
    #: Log lines that a reader should know, as text or objects.
    findings: tuple[Json, ...]


@dataclass(frozen=True)
class Parity:
    """The comparison with the reference. "not run" is a state of its own and never a pass."""

    state: Literal["passed", "failed", "not run"]
    #: Why it was not run, or what failed.
    reason: str | None
    reference: Json
    thresholds: Json
    cases: tuple[Json, ...]


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known about a plan. Values of other modules (`options`, `levels`, …) are JSON as they gave it.

    `options` and `model` are ``None`` for a plan that came without them (``origin="stamp"``).
    """

    schema: Literal["jetrt-manifest-1"] = SCHEMA
    #: The version of jetrt that wrote it.
    jetrt: Line
    #: UTC.
    created: Time = field(default_factory=_now)
    origin: Literal["build", "stamp"]
    #: `key_of` what it was built from.
    key: Sha256
    engine: EngineFile
    model: ModelFile | None
    options: Mapping[str, Json] | None
    #: The command line that makes this plan, beginning with "jetrt".
    command: tuple[Line, ...] | None
    machine: Machine
    #: The oldest driver that can run it.
    driver_floor: Version | None = None
    calibration: Mapping[str, Json] | None = None
    timing_cache: Mapping[str, Json] | None = None
    #: Built without weights: it runs only after a refit from its ONNX.
    stripped: bool = False
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: tuple[Mapping[str, Json], ...]
    build: BuildReport | None = None
    levels: Mapping[str, Json] | None = None
    audit: Mapping[str, Json] | None = None
    parity: Parity

    @staticmethod
    def path_for(engine: str | os.PathLike[str]) -> Path:
        return Path(f"{os.fspath(engine)}.json")

    def to_mapping(self) -> dict[str, Json]:
        """As dicts, lists and plain values."""
        mapping: dict[str, Json] = plain(self)
        return mapping

    def to_json(self) -> str:
        """Sorted keys, two spaces, a newline at the end: equal manifests give equal bytes.

        Raises `ManifestError` for a value that `from_json` would refuse, so that none is ever written.
        """
        mapping = self.to_mapping()
        _read(mapping, f"the manifest of {self.engine.file}")
        text = json.dumps(mapping, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if len(text.encode()) > LARGEST:
            raise ManifestError(
                f"The manifest of {self.engine.file} would have {len(text.encode())} bytes; at most {LARGEST} are "
                "allowed. Its audit or log is too long."
            )
        return text

    @staticmethod
    def from_json(text: str | bytes, *, path: str | os.PathLike[str] | None = None) -> Manifest:
        """Reads a manifest. `path` is named in errors.

        Raises `ManifestError` with the JSON pointer of what is wrong, whatever the bytes are.
        """
        name = "the manifest" if path is None else os.fspath(path)
        try:
            data = text.encode() if isinstance(text, str) else text
            if len(data) > LARGEST:
                raise InvalidError(f"more than {LARGEST} bytes")
            value = parse(data)
        except (InvalidError, UnicodeEncodeError) as error:
            raise _refused(name, "", str(error)) from error
        return _read(value, name)

    @staticmethod
    def read(engine: str | os.PathLike[str]) -> Manifest | None:
        """The manifest beside a plan, ``None`` when there is none."""
        path = Manifest.path_for(engine)
        try:
            data = read_regular(path, LARGEST + 1)
        except OSError as error:
            raise _refused(str(path), "", f"cannot be read: {error.strerror}") from error
        return None if data is None else Manifest.from_json(data, path=path)


def _read(value: Json, name: str) -> Manifest:
    # The version first: a newer one may have any other keys.
    version = value.get("schema") if isinstance(value, dict) else None
    if isinstance(version, str) and version != SCHEMA:
        raise ManifestError(
            f"{name}: its schema is {shown(version)}, and this jetrt reads {SCHEMA!r}. Use a jetrt that knows it, or "
            'build the plan again; verify="off" loads it unchecked.',
            path=name,
            found=version,
            allowed=SCHEMA,
        )
    try:
        manifest: Manifest = reader(Manifest)(value)
        if manifest.command is not None and manifest.command[:1] != ("jetrt",):
            # It is shown as something to run.
            raise InvalidError('does not begin with "jetrt"', "command")
        return manifest
    except InvalidError as error:
        raise _refused(name, error.pointer, str(error)) from error


def _refused(name: str, pointer: str, problem: str) -> ManifestError:
    place = f"{name}: {pointer}: " if pointer else f"{name}: "
    return ManifestError(
        f"{place}{problem}. The manifest is damaged or was not written by jetrt. Copy it again beside its plan, or "
        "build the plan again.",
        path=name,
        found=f"{pointer}: {problem}" if pointer else problem,
    )


def key_of(*, model_sha256: str, options: Mapping[str, Json], calibration_sha256: str | None, machine: Machine) -> str:
    """What decides the bytes of a plan, as 64 hex digits: two builds with one key are the same build.

    `options` are those that shape the plan; whatever else is in them makes equal builds differ.
    """
    content = {
        "model": model_sha256,
        "options": options,
        "calibration": calibration_sha256,
        "target": {"tensorrt": machine.tensorrt, "sm": machine.sm, "sm_count": machine.sm_count},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
