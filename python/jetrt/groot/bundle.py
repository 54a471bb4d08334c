"""A folder of engines for a whole policy, checked before anything of the policy is deleted.

Which plans a mode needs, what their inputs and outputs are, and what must agree between them, export_metadata.json and
the policy, is in the tables at the top. Everything that is wrong is said in one error.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .. import _core
from ..errors import JetrtError
from ..report import dims as shown
from .files import DIT
from .preloading import available, borrow, discard, keep, load_core

__all__ = ["Bundle", "BundleError", "MissingPlanError", "check_bundle"]

_log = logging.getLogger("jetrt.groot")

METADATA = "export_metadata.json"
#: The layout of export_metadata.json that is known.
SCHEMA_VERSION = 1
#: What a file of that layout has. Older files have no schema_version and fewer keys.
REQUIRED_KEYS = (
    "sa_seq_len",
    "vl_seq_len",
    "llm_seq_len",
    "num_patches",
    "num_merged_patches",
    "num_vis_tokens",
    "action_horizon",
    "batch_size",
    "precision",
)

_Names = dict[str, tuple[str, ...]]

_HEAD: _Names = {
    "state_encoder": ("state_encoder.engine",),
    "action_encoder": ("action_encoder.engine",),
    "dit": ("dit_bf16.engine",),
    "action_decoder": ("action_decoder.engine",),
}
_LLM: _Names = {"llm": ("llm_bf16.engine",)}
_VIT = ("vit.engine", "vit_bf16.engine")
#: mode -> role -> names of its plan, the first that is there counts.
REQUIRED: dict[str, _Names] = {
    "dit_only": {"dit": DIT},
    "action_head": _HEAD,
    "vit_llm_only": {"vit": _VIT, **_LLM},
    "n17_full_pipeline": _HEAD,
    "full_pipeline": {**_LLM, **_HEAD},
}
#: The same for plans whose torch module runs where they are absent.
OPTIONAL: dict[str, _Names] = {
    "n17_full_pipeline": {"vit": _VIT, **_LLM, "vl_self_attention": ("vl_self_attention.engine",)},
    "full_pipeline": {"vit": ("vit_bf16.engine",)},
}
#: The same for plans that are needed if the metadata says that the whole pipeline was exported.
EXPORTED: dict[str, _Names] = {"n17_full_pipeline": {"vit": _VIT}}
#: The mode of N1.5's set-up, whose plans carry their precisions in their names and whose inputs are not checked.
N1_5 = "n1.5"

# Letters stand for sizes that must agree everywhere; see _MEANING.
_Shape = tuple["str | int", ...]
_BF16, _FLOATS = ("bfloat16",), ("bfloat16", "float16", "float32")
_INT, _BOOL = ("int64",), ("bool",)


class _Port(NamedTuple):
    shape: _Shape
    dtypes: tuple[str, ...]
    needed: bool = True


#: role -> inputs in the order in which the scripts pass them, and outputs.
_PORTS: dict[str, tuple[dict[str, _Port], dict[str, _Port]]] = {
    "dit": (
        {
            "sa_embs": _Port(("B", "T", "E"), _BF16),
            "vl_embs": _Port(("B", "S", "V"), _BF16),
            "timestep": _Port(("B",), _INT),
            "image_mask": _Port(("B", "S"), _BOOL, needed=False),
            "backbone_attention_mask": _Port(("B", "S"), _BOOL, needed=False),
        },
        {"output": _Port(("B", "T", "M"), _BF16)},
    ),
    "state_encoder": (
        {"state": _Port(("B", 1, "P"), _BF16), "embodiment_id": _Port(("B",), _INT)},
        {"output": _Port(("B", 1, "E"), _BF16)},
    ),
    "action_encoder": (
        {
            "actions": _Port(("B", "H", "A"), _BF16),
            "timesteps": _Port(("B",), _INT),
            "embodiment_id": _Port(("B",), _INT),
        },
        {"output": _Port(("B", "H", "E"), _BF16)},
    ),
    "action_decoder": (
        {"model_output": _Port(("B", "T", "M"), _BF16), "embodiment_id": _Port(("B",), _INT)},
        {"output": _Port(("B", "T", "A"), _BF16)},
    ),
    "vl_self_attention": (
        {"hidden_states": _Port(("B", "S", "V"), _BF16)},
        {"output": _Port(("B", "S", "V"), _BF16)},
    ),
    "llm": (
        {
            "inputs_embeds": _Port(("B", "S", "V"), _FLOATS),
            "attention_mask": _Port(("B", "S"), _INT),
            "position_ids": _Port((3, "B", "S"), _INT, needed=False),
            "visual_pos_masks": _Port(("B", "S"), _BOOL, needed=False),
            **{f"deepstack_{i}": _Port(("N", "V"), _FLOATS, needed=False) for i in range(8)},
        },
        {"embeddings": _Port(("B", "S", "V"), _FLOATS)},
    ),
}
_VIT_PORTS = {
    "full_pipeline": (
        {"pixel_values": _Port(("?", 3, "?", "?"), _BF16)},
        {"vit_embeds": _Port(("?", "?", "?"), _FLOATS)},
    ),
    "": (
        {"pixel_values": _Port(("X", "?"), _FLOATS)},
        {"image_embeds": _Port(("?", "V"), _FLOATS)},
    ),
}

_MEANING = {
    "B": "batch_size",
    "T": "sa_seq_len",
    "S": "vl_seq_len",
    "H": "action_horizon",
    "A": "max_action_dim",
    "P": "max_state_dim x state_history_length",
    "E": "input_embedding_dim",
    "V": "backbone_embedding_dim",
    "M": "hidden_size",
    "X": "patches of a batch",
    "N": "visual tokens",
}


class BundleError(JetrtError, ValueError):
    """Plans of a folder do not make up what the mode needs, or do not fit together, their metadata or the policy."""

    #: One sentence each.
    problems: list[str] | None = None


class MissingPlanError(BundleError, FileNotFoundError):
    """The same, and at least one plan is not there."""


@dataclass(frozen=True)
class Bundle:
    """A checked folder."""

    folder: Path
    mode: str
    #: role ("dit", "llm", …) -> plan.
    plans: dict[str, Path]
    #: Of export_metadata.json; None if there is none.
    metadata: dict[str, Any] | None
    #: Rows per call, which the export bakes into the engines.
    batch_size: int
    #: What could not be checked, and what is left to torch.
    notes: list[str] = field(default_factory=list)


def check_bundle(
    folder: str | os.PathLike[str],
    mode: str,
    policy: Any = None,
    *,
    device: int = 0,
    precisions: Mapping[str, str] | None = None,
    keep_engines: bool = False,
) -> Bundle:
    """Checks a folder of plans whole: files, metadata, batch size, each engine's inputs and outputs, the policy.

    mode: "dit_only", "action_head", "vit_llm_only", "n17_full_pipeline" (N1.7), "full_pipeline" (N1.6), or "n1.5" with
        precisions={"vit": "fp8", "llm": "nvfp4", "dit": "fp8"}, of which the files alone are checked. An enum of the
        scripts will do.
    policy: its action head's configuration is compared; None: the plans and their metadata only.
    keep_engines: keeps the engines for `jetrt.trt_torch.Engine`, if all of them fit into the free memory beside the
        policy. Otherwise each is loaded, looked at and closed, largest last, so that the check needs the memory of one.

    Returns a `Bundle`. Raises `ValueError` (unknown mode), `MissingPlanError` (a FileNotFoundError) or `BundleError` (a
    ValueError) with everything that was found. Nothing is changed.
    """
    folder, mode = Path(folder), str(getattr(mode, "value", mode))
    required, optional = _roles(mode, precisions)
    problems: list[str] = []
    notes: list[str] = []
    metadata = _metadata(folder, problems, notes)
    if (metadata or {}).get("export_mode") == "full_pipeline":
        required = {**required, **EXPORTED.get(mode, {})}
    plans, missing = _found(folder, required, optional, notes)
    sizes = _Sizes(problems)
    if metadata is not None:
        _read_metadata(metadata, sizes, problems)
    if policy is not None:
        _read_policy(policy, sizes)
    kept: list[Path] = []
    if not missing:
        kept = _check_engines(plans, mode, metadata, sizes, problems, device=device, keep_engines=keep_engines)
    problems = missing + problems
    if problems:
        for path in kept:
            discard(path, device, "engine")
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise (MissingPlanError if missing else BundleError)(
            f"{folder}: found {len(problems)} problem{'s' * (len(problems) > 1)} for mode {mode!r}:\n{lines}\n"
            "The policy is as it was. Export and build the engines again for it, or name the folder that fits it.",
            problems=problems,
            errno=errno.ENOENT if missing else None,
            filename=str(folder),
        )
    for note in notes:
        _log.warning("%s: %s", folder, note)
    return Bundle(folder, mode, plans, metadata, sizes.value("B") or 1, notes)


# Files ----------------------------------------------------------------------------------------------------------------


def _roles(mode: str, precisions: Mapping[str, str] | None) -> tuple[_Names, _Names]:
    if mode == N1_5:
        of = {"vit": "fp8", "llm": "nvfp4", "dit": "fp8", **(precisions or {})}
        names = [f"vit_{of['vit']}", f"llm_{of['llm']}", "vlln_vl_self_attention", "state_encoder", "action_encoder"]
        names += [f"DiT_{of['dit']}", "action_decoder"]
        return {name: (f"{name}.engine",) for name in names}, {}
    if mode not in REQUIRED:
        raise ValueError(f"Unknown mode: found {mode!r}; allowed: {', '.join(map(repr, REQUIRED))}")
    return REQUIRED[mode], OPTIONAL.get(mode, {})


def _found(folder: Path, required: _Names, optional: _Names, notes: list[str]) -> tuple[dict[str, Path], list[str]]:
    if not folder.is_dir():
        return {}, [f"no folder is there, and {', '.join(names[0] for names in required.values())} are needed"]
    plans: dict[str, Path] = {}
    missing = []
    for role, names in {**required, **optional}.items():
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            plans[role] = path
        elif role in required:
            missing.append(f"{names[0]} is missing" + "".join(f" (nor is there {name})" for name in names[1:]))
        else:
            notes.append(f"{names[0]} is not there: torch computes the {role}")
    return plans, missing


# Metadata and policy --------------------------------------------------------------------------------------------------


def _metadata(folder: Path, problems: list[str], notes: list[str]) -> dict[str, Any] | None:
    for path in (folder / METADATA, folder.parent / "onnx" / METADATA):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} cannot be read ({error})")
            return None
        if isinstance(found, dict):
            return found
        problems.append(f"{path.name}: found a JSON {type(found).__name__}; allowed: an object")
        return None
    notes.append(f"no {METADATA}: batch size and sequence lengths are taken from the engines")
    return None


def _read_metadata(metadata: Mapping[str, Any], sizes: _Sizes, problems: list[str]) -> None:
    version = metadata.get("schema_version")
    if version not in (None, SCHEMA_VERSION):
        problems.append(f"{METADATA}: found schema_version {version!r}; allowed: {SCHEMA_VERSION}, or none")
        return
    absent = [key for key in REQUIRED_KEYS if version is not None and key not in metadata]
    if absent:
        problems.append(f"{METADATA}: {', '.join(absent)} missing")
    for letter in "BTSHAEVM":
        value = metadata.get(_MEANING[letter])
        if value is None:
            continue
        if type(value) is not int or value < 1:
            problems.append(f"{METADATA}: {_MEANING[letter]}: found {value!r}; allowed: a whole number from 1")
        else:
            sizes.say(letter, value, METADATA)
    horizon, length = metadata.get("action_horizon"), metadata.get("sa_seq_len")
    if type(horizon) is int and type(length) is int and length != horizon + 1:
        problems.append(f"{METADATA}: sa_seq_len is {length}, and action_horizon {horizon} makes it {horizon + 1}")
    state, history = metadata.get("max_state_dim"), metadata.get("state_history_length", 1)
    if type(state) is int and type(history) is int:
        sizes.say("P", state * history, METADATA)
    _read_grid(metadata, sizes, problems)


def _read_grid(metadata: Mapping[str, Any], sizes: _Sizes, problems: list[str]) -> None:
    """The views that the vision engine is baked for: [frames, rows, columns] of patches each."""
    grid = metadata.get("vit_grid_thw")
    if grid is None:
        return
    try:
        patches = sum(int(t) * int(h) * int(w) for t, h, w in grid)
    except (TypeError, ValueError):
        problems.append(f"{METADATA}: vit_grid_thw: found {grid!r}; allowed: rows of three numbers")
        return
    if metadata.get("num_patches") not in (None, patches):
        problems.append(
            f"{METADATA}: num_patches is {metadata['num_patches']}, and vit_grid_thw {grid} has {patches} patches"
        )
    batch = metadata.get("batch_size", 1)
    if type(batch) is int:
        sizes.say("X", patches * batch, f"{METADATA}'s vit_grid_thw")


def _read_policy(policy: Any, sizes: _Sizes) -> None:
    head = getattr(getattr(policy, "model", None), "action_head", None)
    config = getattr(head, "config", None)
    for letter in "HAEVM":
        value = getattr(config, _MEANING[letter], None)
        if isinstance(value, int):
            sizes.say(letter, value, "the policy's configuration")
            if letter == "H":
                sizes.say("T", value + 1, "the policy's configuration")
    # The script's set-up asserts this one, after it has deleted the modules.
    for letter, name in (("A", "action_dim"), ("H", "action_horizon")):
        value = getattr(head, name, None)
        if isinstance(value, int):
            sizes.say(letter, value, f"the action head's {name}")
    state = getattr(config, "max_state_dim", None)
    if isinstance(state, int):
        sizes.say("P", state * int(getattr(config, "state_history_length", 1)), "the policy's configuration")


class _Sizes:
    """Sizes that must agree, and who said each first."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems
        self._said: dict[str, tuple[int, str]] = {}

    def value(self, letter: str) -> int | None:
        return self._said[letter][0] if letter in self._said else None

    def say(self, letter: str, value: int, source: str) -> None:
        first = self._said.setdefault(letter, (value, source))
        if first[0] != value:
            self._problems.append(f"{_MEANING[letter]}: {first[1]} has {first[0]}, and {source} has {value}")


# Engines --------------------------------------------------------------------------------------------------------------


def _check_engines(
    plans: Mapping[str, Path],
    mode: str,
    metadata: Mapping[str, Any] | None,
    sizes: _Sizes,
    problems: list[str],
    *,
    device: int,
    keep_engines: bool,
) -> list[Path]:
    """The plans whose engines were loaded and kept."""
    kept: list[Path] = []
    bytes_of = {role: path.stat().st_size for role, path in plans.items()}
    # A quarter on top for what an engine needs besides its weights.
    together = keep_engines and sum(bytes_of.values()) * 5 // 4 <= available(device)
    order = sorted(plans, key=bytes_of.__getitem__, reverse=together)
    for role in order:
        path = plans[role]
        ports = _ports(role, mode, metadata)
        loaded = borrow(path, device, "engine")
        if loaded is None and ports is None and not together:
            continue
        try:
            engine = loaded if loaded is not None else load_core(path, device, "engine")
        except JetrtError as error:
            problems.append(f"{path.name}: {error}")
            continue
        if ports is not None:
            problems.extend(_compared(path.name, engine, ports, sizes))
        if loaded is None:
            if together:
                keep(path, device, "engine", engine)
                kept.append(path)
            else:
                engine.close()
    return kept


_Ports = tuple[Mapping[str, _Port], Mapping[str, _Port]]


def _ports(role: str, mode: str, metadata: Mapping[str, Any] | None) -> _Ports | None:
    if mode == N1_5 or (metadata or {}).get("optimized_action_head"):
        return None  # FP16 engines with other inputs, and an action head that was exported otherwise
    if role == "vit":
        return _VIT_PORTS.get(mode, _VIT_PORTS[""])
    return _PORTS[role]


def _compared(name: str, engine: _core.Engine, ports: _Ports, sizes: _Sizes) -> Iterator[str]:
    for kind, found, wanted in (("input", engine.inputs, ports[0]), ("output", engine.outputs, ports[1])):
        for absent in [port for port, spec in wanted.items() if spec.needed and port not in found]:
            yield f"{name}: {kind} {absent} is missing; it has {', '.join(found)}"
        if kind == "input":
            for extra in [port for port in found if port not in wanted]:
                yield f"{name}: input {extra} is one that the scripts pass nothing for"
            order = [port for port in wanted if port in found and wanted[port].needed]
            first = list(found)[: len(order)]
            if first != order and set(order) <= set(found):
                yield f"{name}: found the inputs in the order {', '.join(first)}; the scripts pass {', '.join(order)}"
        for port, spec in wanted.items():
            if port in found:
                yield from _compared_port(f"{name}: {kind} {port}", found[port], spec, sizes)


def _compared_port(where: str, info: _core.TensorInfo, spec: _Port, sizes: _Sizes) -> Iterator[str]:
    if info.dtype not in spec.dtypes:
        yield f"{where}: found {info.dtype}; allowed: {' or '.join(spec.dtypes)}"
    if len(info.shape) != len(spec.shape):
        yield f"{where}: found {shown(info.shape)}; allowed: {len(spec.shape)} dimensions"
        return
    for axis, wanted in enumerate(spec.shape):
        size = info.shape[axis]
        if wanted == "?":
            continue
        value = wanted if isinstance(wanted, int) else sizes.value(wanted)
        if size >= 0:
            if isinstance(wanted, int):
                if size != wanted:
                    yield f"{where}: found {shown(info.shape)}; allowed: {wanted} in dimension {axis}"
            else:
                sizes.say(wanted, size, where)
        elif value is not None and not _within(info.profiles, axis, value):
            ranges = " or ".join(f"{low[axis]} to {high[axis]}" for low, _, high in info.profiles)
            meaning = _MEANING.get(str(wanted), "the scripts")
            yield f"{where}: dimension {axis} takes {ranges}, and {meaning} is {value}"


def _within(profiles: Sequence[tuple[Sequence[int], ...]], axis: int, value: int) -> bool:
    return not profiles or any(low[axis] <= value <= high[axis] for low, _, high in profiles)
