"""What each TensorRT version has of what `jetrt build` can ask for. A test compares it with abi/enums.csv and
abi/vtables.csv."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FLAGS", "HARDWARE_LEVELS", "PLATFORMS", "SETTINGS", "TACTIC_SOURCES", "TILING_LEVELS", "Presence"]

Version = tuple[int, ...]


@dataclass(frozen=True)
class Presence:
    since: tuple[int, int] = (10, 0)
    in_11: bool = True

    def there(self, tensorrt: Version) -> bool:
        return tensorrt[:2] >= self.since and (self.in_11 or tensorrt[0] < 11)

    def __str__(self) -> str:
        first = ".".join(map(str, self.since))
        return f"TensorRT {first} and later" if self.in_11 else f"TensorRT {first} up to the last 10"


_ALWAYS, _ONLY_10 = Presence(), Presence(in_11=False)

FLAGS = {
    "FP16": _ONLY_10,
    "INT8": _ONLY_10,
    "DEBUG": _ALWAYS,
    "GPU_FALLBACK": _ALWAYS,
    "REFIT": _ALWAYS,
    "DISABLE_TIMING_CACHE": _ALWAYS,
    "TF32": _ALWAYS,
    "SPARSE_WEIGHTS": _ALWAYS,
    "SAFETY_SCOPE": _ALWAYS,
    "OBEY_PRECISION_CONSTRAINTS": _ONLY_10,
    "PREFER_PRECISION_CONSTRAINTS": _ONLY_10,
    "DIRECT_IO": _ALWAYS,
    "REJECT_EMPTY_ALGORITHMS": _ONLY_10,
    "VERSION_COMPATIBLE": _ALWAYS,
    "EXCLUDE_LEAN_RUNTIME": _ALWAYS,
    "FP8": _ONLY_10,
    "ERROR_ON_TIMING_CACHE_MISS": _ALWAYS,
    "BF16": _ONLY_10,
    "DISABLE_COMPILATION_CACHE": _ALWAYS,
    "STRIP_PLAN": _ALWAYS,
    "WEIGHTLESS": _ONLY_10,
    "REFIT_IDENTICAL": _ALWAYS,
    "WEIGHT_STREAMING": _ALWAYS,
    "INT4": Presence((10, 1), in_11=False),
    "REFIT_INDIVIDUAL": Presence((10, 2)),
    "STRICT_NANS": Presence((10, 6)),
    "MONITOR_MEMORY": Presence((10, 6)),
    "FP4": Presence((10, 8), in_11=False),
    "EDITABLE_TIMING_CACHE": Presence((10, 8)),
    "DISTRIBUTIVE_INDEPENDENCE": Presence((10, 12)),
}
TACTIC_SOURCES = {
    "CUBLAS": _ONLY_10,
    "CUBLAS_LT": _ONLY_10,
    "CUDNN": _ONLY_10,
    "EDGE_MASK_CONVOLUTIONS": _ALWAYS,
    "JIT_CONVOLUTIONS": _ALWAYS,
}
HARDWARE_LEVELS = {"AMPERE_PLUS": _ALWAYS, "SAME_COMPUTE_CAPABILITY": Presence((10, 9))}
TILING_LEVELS = dict.fromkeys(("NONE", "FAST", "MODERATE", "FULL"), Presence((10, 8)))
PLATFORMS = dict.fromkeys(("SAME_AS_BUILD", "WINDOWS_AMD64"), Presence((10, 2)))
#: Settings that ``--set`` takes: the setter of IBuilderConfig, the versions that have it, and the words it takes where
#: it takes no number.
SETTINGS: dict[str, tuple[str, Presence, dict[str, Presence] | None]] = {
    "avg_timing_iterations": ("setAvgTimingIterations", _ALWAYS, None),
    "max_nb_tactics": ("setMaxNbTactics", Presence((10, 4)), None),
    "l2_limit_for_tiling": ("setL2LimitForTiling", Presence((10, 8)), None),
    "tiling_optimization_level": ("setTilingOptimizationLevel", Presence((10, 8)), TILING_LEVELS),
    "runtime_platform": ("setRuntimePlatform", Presence((10, 2)), PLATFORMS),
}
