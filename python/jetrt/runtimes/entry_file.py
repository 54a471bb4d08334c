"""`EngineCacheEntry` as a JSON file, for programs that load the same engines again after a restart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import EngineBuildError, EngineDeserializeError
from ..provenance.publish import replace_text
from ..runtime import BuildConfig, EngineCacheEntry

SCHEMA = "jetrt-engine-entry-1"


def save(entry: EngineCacheEntry, path: str | os.PathLike[str]) -> None:
    """Writes it in one step. Raises `EngineBuildError`."""
    if not entry.sha256:
        raise EngineBuildError(
            f"{entry.path}: the entry was made from a module in this process; there is no file that could be loaded "
            "after a restart. Export the module, and compile the file.",
            path=str(entry.path),
        )
    file, engine = Path(path).absolute(), entry.path.absolute()
    if engine.is_relative_to(file.parent):
        engine = engine.relative_to(file.parent)
    build = entry.build_config
    content = {
        "schema": SCHEMA,
        "path": str(engine),
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "runtime": entry.runtime,
        "versions": dict(entry.versions),
        "build_config": None
        if build is None
        else {
            "precision": build.precision,
            "workspace_mb": build.workspace_mb,
            "calibration_dataset": None if build.calibration_dataset is None else str(build.calibration_dataset),
            "optimization_profiles": build.optimization_profiles,
        },
    }
    replace_text(file, json.dumps(content, indent=2) + "\n")


def load(path: str | os.PathLike[str]) -> EngineCacheEntry:
    """Reads it back. Raises `EngineDeserializeError`."""
    file = Path(path)

    def refuse(why: str) -> NoReturn:
        raise EngineDeserializeError(
            f"{file} is no engine entry of jetrt: {why}. Write it again with EngineCacheEntry.save.", path=str(file)
        )

    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        refuse(f"it is no JSON ({error})")
    if not isinstance(content, dict):
        refuse(f"it holds a {type(content).__name__}, not an object")
    if content.get("schema") != SCHEMA:
        refuse(f"schema is {content.get('schema')!r}; allowed: {SCHEMA!r}")

    def get(key: str, kind: type, table: Mapping[str, Any] = content) -> Any:
        value = table.get(key)
        if type(value) is not kind:
            refuse(f"{key} is {value!r}, not of type {kind.__name__}")
        return value

    versions = get("versions", dict)
    if not all(isinstance(version, str) for version in versions.values()):
        refuse(f"versions is {versions!r}; each must be a text")
    build = content.get("build_config")
    if build is not None:
        build = get("build_config", dict)
        try:
            build = BuildConfig(**build)
        except (TypeError, ValueError) as error:
            refuse(f"build_config: {error}")
    return EngineCacheEntry(
        path=file.absolute().parent / get("path", str),  # an absolute path stays as it is
        sha256=get("sha256", str),
        size_bytes=get("size_bytes", int),
        runtime=get("runtime", str),
        versions=versions,
        build_config=build,
    )
