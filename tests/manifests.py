"""A manifest, a machine and a plan for tests, and strategies for any others."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

import fakes
from jetrt.provenance import EngineFile, Machine, Manifest, ModelFile, Parity, Sha256Sidecar, Tensor, engine_lock

PLAN = b"the bytes of one plan."
ORIN = Machine(
    tensorrt="10.3.0.30",
    cuda="12.6",
    driver="540.4.0",
    sm=87,
    sm_count=16,
    gpu="Orin",
    arch="aarch64",
    l4t="36.4.7",
    jetpack="6.2.1",
    power_mode="MAXN",
    memory_bytes=65_893_269_504,
)
COMMAND = ("jetrt", "build", "--onnx", "my model.onnx", "--engine", "det.engine", "--precision", "fp16")
MANIFEST = Manifest(
    jetrt="0.1.0",
    created="2026-11-20T21:13:07Z",
    origin="build",
    key="0" * 64,
    engine=EngineFile("det.engine", hashlib.sha256(PLAN).hexdigest(), len(PLAN)),
    model=ModelFile("my model.onnx", "1" * 64, (), 17, "pytorch 2.4"),
    options={"precision": "fp16", "opt_level": 3},
    command=COMMAND,
    machine=ORIN,
    inputs=(Tensor("x", "float32", (-1, 3, 640, 640), "device", "kLINEAR"),),
    outputs=(Tensor("y", "float32", (-1, 10), "device", "kLINEAR"),),
    profiles=({"shapes": {"x": {"min": [1, 3, 640, 640], "opt": [1, 3, 640, 640], "max": [4, 3, 640, 640]}}},),
    parity=Parity("passed", None, "onnxruntime CPU", {"cosine": 0.999}, ({"cosine": 0.99999},)),
)


KEY = MANIFEST.key
FILES = ["det.engine", "det.engine.json", "det.engine.sha256"]

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    # No whole floats: JSON Schema takes them for integers.
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.integers(-999, 999).map(lambda n: n + 0.5) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field, from its annotation."""
    if kind is Any:
        return JSON
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return st.builds(kind, **{f.name: values(hints[f.name]) for f in fields(kind)})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, rule = arguments
        if rule.pattern is not None:
            return st.from_regex(rule.pattern, fullmatch=True)
        return st.integers(rule.least, 10**17) if base is int else st.floats(rule.least, 1e9)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if type(None) in arguments:
        return st.none() | values(next(a for a in arguments if a is not type(None)))
    if kind is str:
        return TEXT
    if kind is bool:
        return st.booleans()
    return st.dictionaries(TEXT, JSON, max_size=2)


MANIFESTS = values(Manifest).map(lambda m: m if m.command is None else replace(m, command=("jetrt", *m.command)))


def put(folder: Path, manifest: Manifest = MANIFEST, plan: bytes = PLAN) -> Path:
    """The plan with its companions."""
    engine = folder / manifest.engine.file
    engine.write_bytes(plan)
    Manifest.path_for(engine).write_text(manifest.to_json())
    Sha256Sidecar(manifest.engine.sha256, engine.name).write(engine)
    return engine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=fakes.environment(), stdout=subprocess.PIPE, text=True)


def lock_once(path: Path, **keywords: Any) -> None:
    with engine_lock(path, **keywords):
        pass
