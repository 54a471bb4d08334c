"""What `jetrt build` can be told: one frozen record, and its ways in and out.

The command line, a TOML file, a manifest and Python all end in `BuildOptions`, which refuses what contradicts itself
before anything starts; what a TensorRT version or a GPU lacks is refused by `configure`. `BuildOptions.command` is the
way back: parsing what it returns gives equal options.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import BuildOptionError
from . import kinds
from .calibration import MINIMUM_SAMPLES
from .hints import Bound, Hints, did_you_mean, read_metadata
from .kinds import Kind
from .thresholds import Thresholds

__all__ = ["PRECISIONS", "BuildOptions", "add_arguments", "from_arguments"]

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "mixed", "fp8")
_BOUNDS = ("min", "opt", "max")


def _option(kind: Kind, help: str, default: Any = None, *, run: bool = False, names: str = "") -> Any:
    """A field. `run`: it decides how the build runs and what is checked, not what the plan is. `names`: what the
    command line calls it where that is not the field's name; another name of the scripts may follow."""
    return field(default=default, metadata={"kind": kind, "help": help, "run": run, "names": names.split()})


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Every field may be given as the command line writes it ("512M", "95%", "x:1x3x224x224") or as its value; a size
    as a number is bytes. Raises `BuildOptionError`."""

    # --- precision
    precision: str | None = _option(
        kinds.choice(*PRECISIONS),
        "lowest precision that TensorRT may compute in (fp32); with strong typing, what the model must be in",
    )
    strongly_typed: bool = _option(kinds.FLAG, "take every type from the model; TensorRT 11 always does", False)
    int8_only: bool = _option(kinds.FLAG, "int8 without fp16 for layers that have no int8 form", False)
    fp32_patterns: tuple[str, ...] = _option(
        kinds.PATTERNS, "keep layers in fp32 whose name, or an output's name, matches a shell pattern", ()
    )
    fp32_norms: bool = _option(kinds.FLAG, "keep normalisation layers in fp32, decomposed ones too", False)
    io_formats: tuple[str, ...] = _option(
        kinds.TEXTS, "type and layout of inputs and outputs: NAME:fp16:chw16+hwc8, NAME:any:linear", ()
    )
    # --- shapes
    min: tuple[str, ...] = _option(
        kinds.bound("--min"), "smallest shapes: x:1x3x224x224,ids:1x8; once for each profile", ()
    )
    opt: tuple[str, ...] = _option(
        kinds.bound("--opt"), "shapes to tune for; n=[1,2] gives the values of a shape tensor", ()
    )
    max: tuple[str, ...] = _option(kinds.bound("--max"), "largest shapes; batch=8 gives a dimension by its name", ())
    max_seq_len: int | None = _option(kinds.whole(1), "largest length of the dynamic sequence dimensions")
    opt_sa_seq: int | None = _option(kinds.whole(1), "GR00T: length of sa_embs to tune for (1 + action horizon)")
    metadata: str | None = _option(kinds.PATH, "GR00T: export_metadata.json, or its folder, with the usual sizes")
    model_type: str | None = _option(kinds.choice("dit", "backbone"), "GR00T: the fork's shapes for this model")
    allow_default_hints: bool = _option(kinds.FLAG, "GR00T: where no size is known, GR1's with one camera", False)
    # --- the builder
    workspace: int | None = _option(kinds.SIZE, "scratch memory for a layer: 512M, 2G; a number alone is MiB")
    tactic_memory: int | None = _option(kinds.SIZE, "memory for trying tactics")
    tactic_shared_memory: int | None = _option(kinds.SIZE, "shared memory of the GPU that a tactic may use")
    opt_level: int | str | None = _option(
        kinds.LEVEL,
        "optimisation level (3); auto tries several and keeps the fastest right one",
        names="opt-level builder-opt-level",
    )
    levels: tuple[int, ...] | None = _option(kinds.LEVELS, "levels that auto tries (2-5)")
    low_memory_mode: bool = _option(
        kinds.FLAG, "256 MiB workspace, 512 MiB tactic memory, level 0, no external tactics; never strips", False
    )
    tactic_sources: tuple[str, ...] | None = _option(kinds.TACTIC_SOURCES, "tactic sources to use; none for no one")
    aux_streams: int | None = _option(kinds.whole(0), "auxiliary streams that the plan may use")
    sparse_weights: bool = _option(kinds.FLAG, "use 2:4 sparsity where weights have it", False)
    profiling_verbosity: str = _option(
        kinds.choice("detailed", "layer_names_only", "none"), "what the plan tells of its layers (detailed)", "detailed"
    )
    plugins: tuple[str, ...] = _option(kinds.PATHS, "plugin libraries to load", ())
    set_flags: tuple[str, ...] = _option(
        kinds.SETTINGS, "a flag or setting of TensorRT's builder: FLAG, FLAG=off, SETTING=VALUE", (), names="set"
    )
    # --- the plan
    strip_plan: bool = _option(kinds.FLAG, "leave the weights out; they are refitted from the ONNX at load", False)
    refittable: bool = _option(kinds.FLAG, "let weights be exchanged later", False)
    weight_streaming: bool = _option(kinds.FLAG, "let weights stay in host memory; needs strong typing", False)
    version_compatible: bool = _option(kinds.FLAG, "a plan that later TensorRT versions load too", False)
    exclude_lean_runtime: bool = _option(kinds.FLAG, "version compatible without the runtime inside", False)
    hardware_compatibility: str = _option(
        kinds.choice("none", "ampere_plus", "same_compute_capability"), "other GPUs that may run the plan", "none"
    )
    dla_core: int | None = _option(kinds.whole(0, 15), "build for this deep-learning accelerator")
    gpu_fallback: bool = _option(kinds.FLAG, "run on the GPU what the DLA cannot", False)
    # --- int8 calibration
    calib_data: str | None = _option(
        kinds.PATH, ".npz file or folder of images", run=True, names="calib-data calib-dir"
    )
    calib_cache: str | None = _option(kinds.PATH, "calibration cache to use or write", run=True)
    calib_algorithm: str = _option(kinds.choice("entropy", "minmax"), "how ranges are found (entropy)", "entropy")
    calib_batch: int = _option(kinds.whole(1), "samples in a calibration batch (1)", 1)
    calib_min_samples: int = _option(
        kinds.whole(1), "fewest samples to calibrate with (500)", MINIMUM_SAMPLES, run=True
    )
    calib_preprocess: str | None = _option(kinds.TEXT, "how an image becomes an input")
    recalibrate: bool = _option(kinds.FLAG, "calibrate anew where the cache is for something else", False, run=True)
    # --- checks
    parity: bool = _option(kinds.FLAG, "compare the outputs with a reference", True, run=True)
    parity_limit: tuple[str, ...] = _option(
        kinds.TEXTS, "what outputs may differ by: [OUTPUT:]cosine=0.99,max_rel=0.2", (), run=True
    )
    reference: str | None = _option(kinds.TEXT, "what to compare with: a kind of reference, or an .npz file", run=True)
    inputs: str | None = _option(kinds.PATH, ".npz file of inputs to compare with", run=True)
    seed: int = _option(kinds.whole(0), "seed of the inputs that are made up (0)", 0, run=True)
    audit: bool = _option(kinds.FLAG, "list the layers by precision and time", True, run=True)
    require_precision: float | None = _option(
        kinds.PERCENT, "share of the time that must run in the precision asked for, such as 95 or 95%%", run=True
    )
    strict: bool = _option(kinds.FLAG, "let findings fail the build", False, run=True)
    # --- the run
    timing_cache: str | None = _option(kinds.PATH, "timing cache to use and extend", run=True)
    prepare_system: bool = _option(kinds.FLAG, "free memory first: drop caches, swap more; needs root", False, run=True)
    yes: bool = _option(kinds.FLAG, "answer yes where the build would ask", False, run=True)
    timeout: float | None = _option(kinds.SECONDS, "time the build may take: 600, 10m, 2h", run=True)
    level_timeout: float | None = _option(kinds.SECONDS, "time for each level of auto (1h)", run=True)
    levels_timeout: float | None = _option(kinds.SECONDS, "time for all levels of auto (4h)", run=True)
    retry_levels: bool = _option(kinds.FLAG, "try levels again that failed in an earlier run", False, run=True)
    device: int = _option(kinds.whole(0), "number of the GPU (0)", 0, run=True)
    overwrite: bool = _option(kinds.FLAG, "replace a file of this name that is something else", False, run=True)
    rebuild: bool = _option(kinds.FLAG, "build even if the same plan is there", False, run=True)
    dump_layers: str | None = _option(kinds.PATH, "write the network's layers as JSON; - for the terminal", run=True)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            object.__setattr__(self, entry.name, entry.default if value is None else _read(entry, value))
        _check(self)

    # --- what follows from them

    def hints(self) -> Hints:
        """What they say about shapes. Reads the metadata file."""
        bounds = {bound: tuple(Bound.parse(text) for text in getattr(self, bound)) for bound in _BOUNDS}
        return Hints(
            **bounds,
            max_seq_len=self.max_seq_len,
            opt_sa_seq=self.opt_sa_seq,
            metadata=read_metadata(self.metadata) if self.metadata is not None else {},
            model_type=self.model_type,
            allow_default_hints=self.allow_default_hints,
        )

    def thresholds(self, precision: str) -> Thresholds:
        """What outputs may differ by from the reference, for what the plan's precision turned out to be."""
        return Thresholds.parse(precision, self.parity_limit)

    @property
    def tried_levels(self) -> tuple[int, ...]:
        """The levels of ``opt_level="auto"``."""
        return self.levels or (2, 3, 4, 5)

    def shaping(self) -> dict[str, Any]:
        """What makes another plan, as plain JSON, for the key: files by what is in them, not by their names."""
        result = {name: value for name, value in self.to_mapping().items() if name not in _RUN}
        result["levels"] = list(self.tried_levels) if self.opt_level == "auto" else None
        result["metadata"] = read_metadata(self.metadata) if self.metadata is not None else None
        result["plugins"] = [_identity(path) for path in self.plugins]
        return result

    # --- ways out

    def to_mapping(self) -> dict[str, Any]:
        """Every option, as plain JSON."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def command(self, onnx: str | os.PathLike[str], engine: str | os.PathLike[str] | None = None) -> list[str]:
        """The command that builds this again."""
        words = ["jetrt", "build", *_words("--onnx", os.fspath(onnx))]
        words += _words("--engine", os.fspath(engine)) if engine is not None else []
        for entry in fields(self):
            value, flag, kind = getattr(self, entry.name), _flag(entry), entry.metadata["kind"]
            if value == entry.default:
                continue
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            elif kind.many:
                words += [word for item in value or ("none",) for word in _words(flag, item)]
            else:
                words += _words(flag, kind.written(value))
        return words

    # --- ways in

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "options") -> BuildOptions:
        return cls(**_named(mapping, where))

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> BuildOptions:
        """Keys are the names of the options, with - or _; a size as a number is MiB, as on the command line."""
        return cls(**_toml(path))

    @classmethod
    def from_manifest(cls, manifest: str | os.PathLike[str] | Mapping[str, Any]) -> BuildOptions:
        """From a manifest, its file ``x.engine.json``, or the ``x.engine`` that it stands beside."""
        return cls(**_manifest(manifest))


_RUN = frozenset(entry.name for entry in fields(BuildOptions) if entry.metadata["run"])


def _flag(entry: Field[Any]) -> str:
    return f"--{(entry.metadata['names'] or [entry.name.replace('_', '-')])[0]}"


def _read(entry: Field[Any], value: Any) -> Any:
    flag = _flag(entry)
    try:
        return entry.metadata["kind"].read(value)
    except BuildOptionError:
        raise
    except ValueError as error:
        end = "" if str(error).endswith("?") else "."
        raise BuildOptionError(
            f"{flag} is {value!r}; allowed: {error}{end}", option=flag, found=value, allowed=str(error)
        ) from None


def _words(flag: str, value: str) -> list[str]:
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _identity(path: str) -> dict[str, str]:
    try:
        return {"sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    except OSError:
        return {"file": path}  # a name that the loader looks up; loading it says if it is missing


# ---------------------------------------------------------------------------------------------------- contradictions


def _check(o: BuildOptions) -> None:
    for flag, reason in _contradictions(o):
        raise BuildOptionError(f"{flag} {reason}.", option=flag)
    if o.parity_limit:
        o.thresholds("fp32")  # refuses what is no limit
    _check_order(o)


def _contradictions(o: BuildOptions) -> Iterator[tuple[str, str]]:
    precision = o.precision or "fp32"
    lowered = {"--fp32-patterns": o.fp32_patterns, "--fp32-norms": o.fp32_norms}
    calibration = {"--calib-data": o.calib_data, "--calib-cache": o.calib_cache, "--recalibrate": o.recalibrate}

    def given(options: Mapping[str, Any]) -> Iterator[str]:
        return (flag for flag, value in options.items() if value)

    if o.strongly_typed:
        mixed = {"--precision mixed": precision == "mixed", "--int8-only": o.int8_only}
        for flag in given({**mixed, **lowered, **calibration}):
            yield flag, "and --strongly-typed contradict each other: with strong typing every type is the model's own"
    if precision not in ("int8", "mixed"):
        for flag in given(calibration):
            yield flag, f"is for --precision int8 or mixed; the precision is {precision}"
    if o.int8_only and precision != "int8":
        yield "--int8-only", f"is for --precision int8; the precision is {precision}"
    if precision in ("fp32", "tf32"):
        for flag in given(lowered):
            yield flag, f"keeps layers from a lower precision; the precision is {precision}"
    if o.exclude_lean_runtime and not o.version_compatible:
        yield "--exclude-lean-runtime", "is for plans that are --version-compatible"
    if o.gpu_fallback and o.dla_core is None:
        yield "--gpu-fallback", "is for builds with --dla-core"
    if o.dla_core is not None:
        for flag in given({"--strip-plan": o.strip_plan, "--refittable": o.refittable}):
            yield flag, "and --dla-core contradict each other: TensorRT does not refit what runs on the DLA"
        if o.weight_streaming:
            yield (
                "--weight-streaming",
                "and --dla-core contradict each other: the DLA has its weights in its own format",
            )
        if next(given(calibration), None) and o.calib_algorithm != "entropy":
            yield (
                "--calib-algorithm",
                f"{o.calib_algorithm} and --dla-core contradict each other: the DLA takes entropy",
            )
    if o.opt_level != "auto":
        auto = ("levels", "level_timeout", "levels_timeout", "retry_levels")
        for flag in given({f"--{name.replace('_', '-')}": getattr(o, name) for name in auto}):
            yield flag, "is for --opt-level auto"
    if o.require_precision is not None and not o.audit:
        yield "--require-precision", "and --no-audit contradict each other: the audit measures the share"
    if o.require_precision is not None and o.profiling_verbosity != "detailed":
        yield "--require-precision", f"needs --profiling-verbosity detailed; it is {o.profiling_verbosity}"
    if not o.parity:
        for flag in given({"--parity-limit": o.parity_limit, "--reference": o.reference, "--inputs": o.inputs}):
            yield flag, "and --no-parity contradict each other"
    states: dict[str, str] = {}
    for item in o.set_flags:
        name, _, state = item.partition("=")
        if states.setdefault(name, state) != state:
            yield "--set", f"gives {name} the values {states[name]} and {state}"


def _check_order(o: BuildOptions) -> None:
    """min <= opt <= max, as far as it shows without the model."""
    given = {bound: [Bound.parse(text) for text in getattr(o, bound)] for bound in _BOUNDS}
    for index in range(max(map(len, given.values()))):
        here = {bound: texts[min(index, len(texts) - 1)] for bound, texts in given.items() if texts}
        for (low, smaller), (high, larger) in itertools.combinations(here.items(), 2):
            sizes = larger.sizes()
            for where, size in smaller.sizes().items():
                if size > sizes.get(where, size):
                    raise BuildOptionError(
                        f"--{low} {smaller} and --{high} {larger}: {where} is {size} in {low} and {sizes[where]} in "
                        f"{high}; min <= opt <= max must hold.",
                        option=f"--{low}",
                        found=size,
                        allowed=sizes[where],
                    )


# ------------------------------------------------------------------------------------------------------------ ways in


def _named(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The mapping by names of fields."""
    known = {entry.name: entry for entry in fields(BuildOptions)}
    known |= {name.replace("-", "_"): entry for entry in known.values() for name in entry.metadata["names"]}
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise BuildOptionError(
                f"{where}: there is no option {key!r}.{did_you_mean(name, known)}",
                option=str(key),
                found=key,
                allowed=sorted(known),
            )
        if known[name].name in found:
            raise BuildOptionError(f"{where}: {known[name].name!r} is given twice.", option=str(key))
        found[known[name].name] = value
    return found


def _toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    where = f"--config {os.fspath(path)}"
    try:
        toml = importlib.import_module("tomllib")  # Python 3.11
    except ImportError:
        try:
            toml = importlib.import_module("tomli")
        except ImportError as error:
            raise BuildOptionError(
                f"{where}: reading TOML on Python 3.10 needs the package tomli: pip install 'jetrt[build]'.",
                option="--config",
            ) from error
    try:
        content = toml.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise BuildOptionError(f"{where}: {error.strerror or error}.", option="--config") from error
    except (ValueError, RecursionError) as error:
        raise BuildOptionError(f"{where} is not TOML: {error}.", option="--config") from error
    found = _named(content, where)
    for entry in fields(BuildOptions):
        if entry.metadata["kind"] is kinds.SIZE and type(found.get(entry.name)) is int:
            found[entry.name] = str(found[entry.name])
    return found


def _manifest(manifest: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    where = "--from-manifest"
    if not isinstance(manifest, Mapping):
        path = Path(manifest)
        path = path if path.suffix == ".json" else path.with_name(f"{path.name}.json")
        where = f"--from-manifest {path}"
        try:
            manifest = json.loads(path.read_bytes())
        except OSError as error:
            raise BuildOptionError(f"{where}: {error.strerror or error}.", option="--from-manifest") from error
        except (ValueError, RecursionError) as error:
            raise BuildOptionError(f"{where} is not JSON: {error}.", option="--from-manifest") from error
    found = manifest.get("options") if isinstance(manifest, Mapping) else None
    if not isinstance(found, Mapping):
        raise BuildOptionError(
            f"{where} has no build options; a plan that was built elsewhere and stamped here has none.",
            option="--from-manifest",
        )
    return _named(found, where)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option, and ``--config`` and ``--from-manifest``. What is not given is not in the namespace."""
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; the command line wins")
    parser.add_argument(
        "--from-manifest", metavar="FILE", help="options of a plan that was built; they win over --config"
    )
    for name, what in _LIMITS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", action="append", metavar="[OUTPUT=]X", help=what, default=argparse.SUPPRESS
        )
    group: argparse._ActionsContainer = parser
    for entry in fields(BuildOptions):
        if entry.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[entry.name])
        kind: Kind = entry.metadata["kind"]
        flags = [f"--{name}" for name in entry.metadata["names"]] or [_flag(entry)]
        more: dict[str, Any] = {"metavar": kind.metavar}
        if kind is kinds.FLAG:
            more = {"action": argparse.BooleanOptionalAction}
        elif kind.many:
            more |= {"action": "append", "nargs": "+"}
        elif entry.name == "dump_layers":
            more |= {"nargs": "?", "const": "-"}
        group.add_argument(*flags, dest=entry.name, default=argparse.SUPPRESS, help=entry.metadata["help"], **more)


_GROUPS = {  # by their first option
    "precision": "precision",
    "min": "shapes",
    "workspace": "the builder",
    "strip_plan": "the plan",
    "calib_data": "calibration of int8",
    "parity": "checks",
    "timing_cache": "the run",
}
_LIMITS = {
    "cosine": "least cosine between an output and its reference; short for --parity-limit",
    "max_abs": "largest absolute difference",
    "max_rel": "largest relative difference",
}


def from_arguments(arguments: argparse.Namespace) -> BuildOptions:
    """The command line wins over the manifest, the manifest over the file, the file over the defaults."""
    found: dict[str, Any] = {}
    if getattr(arguments, "config", None) is not None:
        found |= _toml(arguments.config)
    if getattr(arguments, "from_manifest", None) is not None:
        found |= _manifest(arguments.from_manifest)
    given = vars(arguments)
    for entry in fields(BuildOptions):
        if entry.name in given:
            words = given[entry.name]
            if entry.name in _BOUNDS:  # each occurrence is a profile
                words = [",".join(parts) for parts in words]
            elif entry.metadata["kind"].many:
                words = [word for parts in words for word in parts]
            found[entry.name] = words
    limits = [(name, *text.rpartition("=")) for name in _LIMITS for text in given.get(name, ())]
    if limits:
        short = [f"{output}:{name}={value}" if output else f"{name}={value}" for name, output, _, value in limits]
        found["parity_limit"] = [*found.get("parity_limit", ()), *short]
    return BuildOptions(**found)
