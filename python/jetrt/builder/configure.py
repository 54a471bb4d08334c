"""Options -> how TensorRT's builder is set, for one library version and one GPU. Pure: nothing is opened or read.

What a library or a GPU does not have is refused by name, with the version that has it. What TensorRT would take without
a word and not do (or do something else) is refused too, or decided here and said in a note.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BuildOptionError
from .hints import did_you_mean
from .io_formats import IoFormat, parse_io_format
from .layers import precision_layers
from .options import BuildOptions
from .system import MIB, lazy_module_loading, memory_limits
from .versions import FLAGS, HARDWARE_LEVELS, SETTINGS, TACTIC_SOURCES, Presence

__all__ = ["IoFormat", "NativeConfig", "native_config", "parse_io_format", "precision_layers"]

Version = tuple[int, ...]


@dataclass(frozen=True)
class NativeConfig:
    #: What the plan is: the precision asked for, or with strong typing that of the model.
    precision: str
    strongly_typed: bool
    flags_on: tuple[str, ...]
    flags_off: tuple[str, ...]
    #: Bytes by pool; a pool that is not named keeps TensorRT's own limit.
    memory_limits: Mapping[str, int]
    #: By the names of `_Network.set_option`.
    settings: Mapping[str, int | str]
    #: ``None``: TensorRT's own choice.
    tactic_sources: tuple[str, ...] | None
    plugins: tuple[str, ...]
    io_formats: tuple[IoFormat, ...]
    parser_flags: tuple[str, ...]
    dla_core: int | None
    #: Variables of the process that builds.
    environment: Mapping[str, str] = field(default_factory=dict)
    #: Sentences to print.
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


# --------------------------------------------------------------------------------------------------- what types need

#: Smallest compute capability with hardware for a type; others would compute in something else, or fail late.
_NEEDS_SM = {"tf32": 80, "bf16": 80, "fp8": 89, "fp4": 100}
_ELEMENT = {"fp16": "float16", "bf16": "bfloat16"}
_CAST = "python -m modelopt.onnx.autocast --onnx_path MODEL.onnx --low_precision_type {} --output_path NEW.onnx"
_QUANTIZE = (
    "python -m modelopt.onnx.quantization --onnx_path MODEL.onnx --quantize_mode {} --calibration_data DATA.npz "
    "--output_path NEW.onnx"
)


# ---------------------------------------------------------------------------------------------------------- decisions


def native_config(
    options: BuildOptions,
    *,
    tensorrt: Version,
    quantization: Collection[str],
    sm: int,
    integrated: bool,
    jetson: bool,
    available_memory: int | None,
    model_dtypes: Collection[str],
    calibrator: bool = False,
) -> NativeConfig:
    """Decides everything that does not need the network.

    ``quantization`` and ``model_dtypes`` as `OnnxFile` has them; ``sm``: 87 for an Orin; ``integrated``: the GPU has no
    memory of its own; ``available_memory``: MemAvailable in bytes; ``calibrator``: Python gave data for one. Raises
    `BuildOptionError`.
    """
    decide = _Decisions(options, tensorrt, frozenset(quantization), sm, jetson, frozenset(model_dtypes))
    decide.calibrated = calibrator or bool(options.calib_data or options.calib_cache)
    precision = decide.precision()
    decide.layers()
    decide.dla(precision)
    decide.plan()
    decide.compatibility(precision)
    decide.chosen()
    return NativeConfig(
        precision=precision,
        strongly_typed=decide.strong,
        flags_on=tuple(name for name, on in decide.flags.items() if on),
        flags_off=tuple(name for name, on in decide.flags.items() if not on),
        memory_limits=decide.memory(integrated, available_memory),
        settings=decide.settings(),
        tactic_sources=decide.tactic_sources(),
        plugins=options.plugins,
        io_formats=tuple(decide.io_formats()),
        # A version-compatible plan cannot hold the InstanceNorm plugin.
        parser_flags=("NATIVE_INSTANCENORM",) if options.version_compatible else (),
        dla_core=options.dla_core,
        environment=lazy_module_loading({}) if options.low_memory_mode else {},
        notes=tuple(decide.notes),
    )


#: Flags that follow from something that does more than the flag.
_OWNED = {
    **dict.fromkeys(("FP16", "INT8", "BF16", "FP8"), "--precision"),
    **dict.fromkeys(("INT4", "FP4"), "a model with such QuantizeLinear/DequantizeLinear nodes, which sets it"),
    **dict.fromkeys(("STRIP_PLAN", "WEIGHTLESS", "REFIT_IDENTICAL"), "--strip-plan"),
    "REFIT": "--refittable",
    "WEIGHT_STREAMING": "--weight-streaming",
    "VERSION_COMPATIBLE": "--version-compatible",
    "EXCLUDE_LEAN_RUNTIME": "--exclude-lean-runtime",
    "SPARSE_WEIGHTS": "--sparse-weights",
    "GPU_FALLBACK": "--gpu-fallback",
    "OBEY_PRECISION_CONSTRAINTS": "--fp32-patterns",
}


def _refuse(option: str, message: str, found: Any = None, allowed: Any = None) -> BuildOptionError:
    return BuildOptionError(f"{option}: {message}", option=option.split()[0], found=found, allowed=allowed)


@dataclass
class _Decisions:
    options: BuildOptions
    tensorrt: Version
    quantization: frozenset[str]
    sm: int
    jetson: bool
    dtypes: frozenset[str]
    calibrated: bool = False
    flags: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, int | str] = field(default_factory=dict)

    @property
    def strong(self) -> bool:
        return self.options.strongly_typed or self.tensorrt[0] >= 11

    @property
    def here(self) -> str:
        return f"TensorRT {'.'.join(map(str, self.tensorrt))}"

    def flag(self, name: str, option: str, on: bool = True) -> None:
        self.there(FLAGS[name], f"the flag {name}", option)
        self.flags[name] = on

    def there(self, presence: Presence, what: str, option: str) -> None:
        if not presence.there(self.tensorrt):
            raise _refuse(option, f"{self.here} does not have {what}; {presence} has it.", self.here, str(presence))

    def hardware(self, kind: str, option: str, who: str) -> None:
        least = _NEEDS_SM.get(kind, 0)
        if self.sm < least:
            raise _refuse(
                option,
                f"{who} {kind}, which needs a GPU of sm_{least} or later; this one is sm_{self.sm}.",
                self.sm,
                least,
            )

    # --- precision

    def precision(self) -> str:
        for kind in sorted(self.quantization):
            self.hardware(kind, "--onnx", "the model is quantised to")
        return self.strong_precision() if self.strong else self.weak_precision()

    def weak_precision(self) -> str:
        wanted, given = self.options.precision or "fp32", self.quantization
        option = f"--precision {wanted}"
        self.hardware(wanted, option, "you asked for")
        if self.calibrated and wanted not in ("int8", "mixed"):
            raise _refuse(option, "calibration data were given, which only int8 and mixed use.")
        if self.calibrated and "int8" in given:
            raise _refuse(
                option,
                "the model has int8 QuantizeLinear/DequantizeLinear nodes, so TensorRT would ignore the calibration. "
                "Leave the calibration data out, or export the model without these nodes.",
            )
        if wanted == "int8" and not self.calibrated and "int8" not in given:
            raise _refuse(
                option,
                "int8 needs ranges: give --calib-data (an .npz file or a folder of images), or a model with "
                f"QuantizeLinear/DequantizeLinear nodes: {_QUANTIZE.format('int8')}. Ranges are never made up.",
            )
        if wanted == "fp8" and "fp8" not in given:
            raise _refuse(
                option,
                "fp8 needs fp8 QuantizeLinear/DequantizeLinear nodes in the model, and it has none; TensorRT would "
                f"build it in higher precision without a word. Make them: {_QUANTIZE.format('fp8')}.",
            )
        lower = {
            "fp16": ["FP16"],
            "bf16": ["BF16"],
            "int8": ["INT8"] if self.options.int8_only else ["INT8", "FP16"],
            "fp8": ["FP8", "BF16"],
            "mixed": ["FP16"],
        }.get(wanted, [])
        if wanted == "mixed":
            has = {
                "BF16": self.sm >= _NEEDS_SM["bf16"],
                "INT8": self.calibrated or "int8" in given,
                "FP8": "fp8" in given,
            }
            lower += [name for name, used in has.items() if used]
        for kind in ("int8", "fp8"):
            if kind in given and kind.upper() not in lower:
                raise _refuse(
                    option,
                    f"the model has {kind} QuantizeLinear/DequantizeLinear nodes; build it with --precision {kind}, or "
                    "with --strongly-typed.",
                )
        if {"INT8", "FP8"} <= {*lower}:
            raise _refuse(option, "TensorRT builds no weakly typed plan with both int8 and fp8. Give --strongly-typed.")
        lower += [kind.upper() for kind in ("int4", "fp4") if kind in given]
        for name in lower:
            self.flag(name, option)
        if wanted in ("fp32", "tf32"):  # TensorRT itself allows TF32 for fp32
            self.hardware(wanted, option, "you asked for")
            self.flag("TF32", option, wanted == "tf32")
        for kind, element in _ELEMENT.items():
            if element in self.dtypes and kind.upper() not in lower:
                self.notes.append(
                    f"{option}: the model itself has {element} tensors; --strongly-typed builds it as it is."
                )
        return wanted

    def strong_precision(self) -> str:
        o, wanted = self.options, self.options.precision
        why = "TensorRT 11 has strong typing alone" if self.tensorrt[0] >= 11 else "the network is strongly typed"
        if self.calibrated:
            raise _refuse(
                "--calib-data",
                f"{why}, and takes no calibrator (those are for TensorRT 10 with weak typing). Quantise the model "
                f"itself: {_QUANTIZE.format('int8')}.",
            )
        if o.int8_only or wanted == "mixed":
            option = "--int8-only" if o.int8_only else "--precision mixed"
            raise _refuse(option, f"{why}: every type is the model's own. Convert the model: {_CAST.format('fp16')}.")
        if "bfloat16" in self.dtypes:
            self.hardware("bf16", "--onnx", "the model is in")
        own = self.own_precision()
        reduced = self.quantization & {"int8", "fp8", "fp4"}
        fits = {
            None: True,
            "fp32": own == "fp32",
            "tf32": own == "fp32",
            "fp16": "float16" in self.dtypes and not reduced,
            "bf16": "bfloat16" in self.dtypes and not reduced,
            "int8": "int8" in reduced,
            "fp8": "fp8" in reduced,
        }
        if not fits[wanted]:
            step = (_QUANTIZE if wanted in ("int8", "fp8") else _CAST).format(wanted)
            convert = f", or convert the model: {step}" if wanted not in ("fp32", "tf32") else ""
            weak = ", leave --strongly-typed out" if self.tensorrt[0] < 11 else ""
            give = "Leave --precision out" if own == "mixed" else f"Give --precision {own}"
            raise _refuse(
                f"--precision {wanted}",
                f"{why}, so the plan computes in the model's types, and the model is {own}. {give}{weak}{convert}.",
                wanted,
                own,
            )
        self.hardware(wanted or own, f"--precision {wanted or own}", "you asked for")
        if own == "fp32":
            self.flag("TF32", f"--precision {wanted or own}", wanted == "tf32")
        return wanted or own

    def own_precision(self) -> str:
        """What a model with types of its own is in, by its lowest."""
        kinds = self.quantization & {"int8", "fp8", "int4", "fp4"}
        floats = [kind for kind, element in _ELEMENT.items() if element in self.dtypes]
        found = sorted(kinds) or floats or ["fp32"]
        return found[0] if len(found) == 1 and found[0] not in ("int4", "fp4") else "mixed"

    def layers(self) -> None:
        o = self.options
        option = "--fp32-patterns" if o.fp32_patterns else "--fp32-norms"
        if not (o.fp32_patterns or o.fp32_norms):
            return
        if self.strong:
            raise _refuse(
                option,
                "TensorRT 11 has no precision of single layers: every type is the model's own. Keep nodes in fp32 when "
                f"you convert it: {_CAST.format('fp16')} --nodes_to_exclude PATTERN.",
            )
        # Without it TensorRT may take the precision of a layer for a wish.
        self.flag("OBEY_PRECISION_CONSTRAINTS", option)
        # "fp32" is not TF32 here either, and TensorRT allows it by default.
        self.flag("TF32", option, False)

    # --- where it runs

    def dla(self, precision: str) -> None:
        o, option = self.options, f"--dla-core {self.options.dla_core}"
        if o.dla_core is None:
            return
        if self.tensorrt[:2] >= (10, 8) and self.tensorrt < (11, 4, 1):
            raise _refuse(
                option, f"{self.here} has no DLA; TensorRT 10.0 to 10.7 and 11.4.1 and later have it.", self.here
            )
        if not self.jetson or self.sm not in (72, 87):
            where = "is a Jetson" if self.jetson else "is no Jetson"
            raise _refuse(option, f"DLA is on Jetson Xavier and Orin alone; this machine {where} with sm_{self.sm}.")
        if precision not in ("fp16", "int8"):
            raise _refuse(
                option,
                f"the DLA computes in fp16 and int8; the precision is {precision}. Give --precision fp16 or int8.",
            )
        if self.tensorrt[0] == 10 and self.strong:
            raise _refuse(option, "the DLA of TensorRT 10 takes no strongly typed network. Leave --strongly-typed out.")
        if o.gpu_fallback:
            self.flag("GPU_FALLBACK", "--gpu-fallback")
        else:
            self.notes.append(
                f"{option}: a layer that the DLA lacks fails the build; --gpu-fallback lets it run on the GPU."
            )

    def plan(self) -> None:
        o = self.options
        if o.strip_plan:
            self.flag("STRIP_PLAN", "--strip-plan")
            if not o.refittable:
                self.flag("REFIT_IDENTICAL", "--strip-plan")
                self.notes.append(
                    "--strip-plan: the plan takes the weights of this very ONNX file back at load, no others."
                )
        if o.refittable:
            self.flag("REFIT", "--refittable")
        if o.weight_streaming:
            if not self.strong:
                raise _refuse("--weight-streaming", "needs a strongly typed network. Give --strongly-typed as well.")
            self.flag("WEIGHT_STREAMING", "--weight-streaming")
        if o.sparse_weights:
            if self.sm < 80:
                raise _refuse(
                    "--sparse-weights", f"needs a GPU of sm_80 or later; this one is sm_{self.sm}.", self.sm, 80
                )
            self.flag("SPARSE_WEIGHTS", "--sparse-weights")

    def compatibility(self, precision: str) -> None:
        o, level = self.options, self.options.hardware_compatibility.upper()
        if o.version_compatible:
            self.flag("VERSION_COMPATIBLE", "--version-compatible")
        if o.exclude_lean_runtime:
            self.flag("EXCLUDE_LEAN_RUNTIME", "--exclude-lean-runtime")
        if level == "NONE":
            return
        option = f"--hardware-compatibility {o.hardware_compatibility}"
        if self.jetson:
            raise _refuse(
                option,
                "JetPack has no hardware compatibility: a plan runs on the module that it was built on. Build on the "
                "target, or on a developer kit that emulates it.",
            )
        self.there(HARDWARE_LEVELS[level], f"the level {level}", option)
        if precision == "fp8" or "fp8" in self.quantization:
            raise _refuse(option, "TensorRT builds no hardware-compatible plan with fp8.")
        least = 80 if level == "AMPERE_PLUS" else 75
        if self.sm < least:
            raise _refuse(option, f"needs a GPU of sm_{least} or later; this one is sm_{self.sm}.", self.sm, least)
        self.extra["hardware_compatibility_level"] = level

    # --- the builder

    def chosen(self) -> None:
        """--set."""
        for item in self.options.set_flags:
            name, _, state = item.partition("=")
            option = f"--set {item}"
            if name in FLAGS:
                self.set_flag(name, state == "on", option)
            elif name in SETTINGS:
                self.set_setting(name, state, option)
            else:
                known = {
                    **{flag: str(there) for flag, there in FLAGS.items()},
                    **{n: str(s[1]) for n, s in SETTINGS.items()},
                }
                near = did_you_mean(name, known)
                versions = "".join(f" {n}: {text}." for n, text in known.items() if repr(n) in near)
                raise _refuse(option, f"there is no flag or setting {name}.{near}{versions}", name, sorted(known))

    def set_flag(self, name: str, on: bool, option: str) -> None:
        if name in _OWNED:
            raise _refuse(option, f"{name} is not set by itself; use {_OWNED[name]}.")
        if self.flags.get(name, on) != on:
            raise _refuse(option, f"--precision {self.options.precision or 'fp32'} has decided {name} already.")
        self.flag(name, option, on)

    def set_setting(self, name: str, state: str, option: str) -> None:
        _, there, words = SETTINGS[name]
        self.there(there, f"the setting {name}", option)
        if words is None:
            if not state.isdecimal() or not 0 < int(state) < 2**31:
                raise _refuse(option, f"{name} takes a whole number above 0.", state)
            self.extra[name] = int(state)
        elif state.upper() in words:
            self.extra[name] = state.upper()
        else:
            raise _refuse(option, f"{name} takes one of {', '.join(words)}.", state, list(words))

    def settings(self) -> dict[str, int | str]:
        o = self.options
        found: dict[str, int | str] = {"profiling_verbosity": o.profiling_verbosity.upper(), **self.extra}
        level = 0 if o.low_memory_mode and o.opt_level is None else o.opt_level
        if isinstance(level, int):  # auto: `levels` sets one after the other
            found["builder_optimization_level"] = level
        if o.aux_streams is not None:
            found["max_aux_streams"] = o.aux_streams
        return found

    def tactic_sources(self) -> tuple[str, ...] | None:
        names = self.options.tactic_sources
        if names is None:
            if self.options.low_memory_mode:  # cuBLAS and cuDNN hold memory of their own
                return ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
            return None
        for name in names:
            if name not in TACTIC_SOURCES:
                near = did_you_mean(name, TACTIC_SOURCES)
                allowed = ", ".join(TACTIC_SOURCES)
                raise _refuse(f"--tactic-sources {name}", f"there is no such source; there are {allowed}.{near}", name)
            self.there(TACTIC_SOURCES[name], f"the tactic source {name}", f"--tactic-sources {name}")
        return names

    def io_formats(self) -> list[IoFormat]:
        found = [parse_io_format(text) for text in self.options.io_formats]
        for entry in found:
            if self.strong and entry.dtype is not None:
                raise _refuse(
                    f"--io-formats {entry.name}",
                    "with strong typing the type is the model's own; write any in its place, or cast in the model.",
                )
        return found

    def memory(self, integrated: bool, available: int | None) -> dict[str, int]:
        o, limits = self.options, {}
        if o.low_memory_mode:
            limits = memory_limits(0, low_memory=True)
        elif integrated and available is not None:
            # A pool may take everything by default, and here that is the system's memory.
            limits = memory_limits(available)
        elif integrated:
            self.notes.append("memory: MemAvailable is unknown, so TensorRT's own limits hold; see --workspace.")
        given = {"WORKSPACE": o.workspace, "TACTIC_DRAM": o.tactic_memory}
        if limits and not o.low_memory_mode:
            derived = [f"{name} {limits[name] // MIB} MiB" for name, size in given.items() if size is None]
            if derived:
                self.notes.append(f"memory: {' and '.join(derived)}, from {(available or 0) // MIB} MiB available.")
        limits |= {name: size for name, size in given.items() if size is not None}
        if integrated and available is not None and (o.workspace or 0) > 0.4 * available:
            self.notes.append(
                f"--workspace: {(o.workspace or 0) // MIB} MiB is much of the {available // MIB} MiB available, "
                "which the GPU shares with everything else."
            )
        if o.tactic_shared_memory is not None:
            if o.tactic_shared_memory < MIB:
                limits["TACTIC_SHARED_MEMORY"] = o.tactic_shared_memory
            else:
                self.notes.append(
                    "--tactic-shared-memory: no GPU has a MiB of shared memory for a block, so nothing is limited; for "
                    "48 KiB write 48K."
                )
        return limits
