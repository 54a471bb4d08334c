"""What a plan is, where it may run, and how it gets under its name.

A plan `x.engine` has two companions: `x.engine.sha256`, as `sha256sum` writes it, and `x.engine.json`, the manifest.
`names` knows the names, `manifest` the record, `publish` writes all three so that no half of them is ever seen, and
`check` compares them with the machine before TensorRT gets the plan.

Nothing here imports more than the standard library: it runs before every load.
"""

from __future__ import annotations

from .check import Difference, check_before_load, check_for_core, check_refit, differences, needs_refit, rebuild_command
from .manifest import (
    SCHEMA,
    BuildReport,
    EngineFile,
    FileHash,
    Machine,
    Manifest,
    ModelFile,
    Parity,
    Tensor,
    key_of,
)
from .names import EngineFilenameSchema, Sha256Sidecar, sha256_of
from .publish import build_once, engine_lock, existing, publish, remove_leftovers, temporary_for, write_error

__all__ = [
    "SCHEMA",
    "BuildReport",
    "Difference",
    "EngineFile",
    "EngineFilenameSchema",
    "FileHash",
    "Machine",
    "Manifest",
    "ModelFile",
    "Parity",
    "Sha256Sidecar",
    "Tensor",
    "build_once",
    "check_before_load",
    "check_for_core",
    "check_refit",
    "differences",
    "engine_lock",
    "existing",
    "key_of",
    "needs_refit",
    "publish",
    "rebuild_command",
    "remove_leftovers",
    "sha256_of",
    "temporary_for",
    "write_error",
]
