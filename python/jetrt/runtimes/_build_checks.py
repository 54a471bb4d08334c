"""What the runtimes that build no plan refuse in a build configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EngineBuildError
from ..report import dims
from ..runtime import BuildConfig, Model


def refuse_precision(path: Path | str, config: BuildConfig, runtime: str, allowed: tuple[str, ...]) -> None:
    """Another precision than the runtime has, and calibration, raise `EngineBuildError`."""
    if config.precision in allowed and config.calibration_dataset is None:
        return
    asked = "calibration" if config.precision in allowed else f"precision {config.precision!r}"
    if allowed == ("fp32",):
        step = 'Leave precision at "fp32" and calibration_dataset out, or convert the model first.'
        can = f"{runtime} runs a model in the types that it has"
    else:
        step = "Choose one of these and leave calibration_dataset out, or choose another runtime."
        can = f"{runtime} has {', '.join(allowed)} and no calibration"
    raise EngineBuildError(f"{path}: {asked} was asked for, and {can}. {step}", path=str(path))


def with_precision(
    path: Path | str, options: Mapping[str, Any], config: BuildConfig | None, runtime: str, allowed: tuple[str, ...]
) -> dict[str, Any]:
    """The options of a model with the precision of the configuration. Two that differ raise `EngineBuildError`."""
    if config is None:
        return dict(options)
    refuse_precision(path, config, runtime, allowed)
    asked = options.get("precision", config.precision)
    if asked != config.precision:
        raise EngineBuildError(
            f"{path}: the build configuration says precision {config.precision!r} and the runtime's options say "
            f"{asked!r}. Leave one of them out.",
            path=str(path),
        )
    return {**options, "precision": config.precision}


def check_profiles(path: Path | str, config: BuildConfig, model: Model) -> None:
    """Profiles of inputs that the model has not, or of another rank, raise `EngineBuildError`."""
    for name, low, _, _ in config.optimization_profiles:
        info = model.inputs.get(name)
        if info is None or len(info.shape) != len(low):
            known = ", ".join(f"{t.name} {t.dtype}{dims(t.shape)}" for t in model.inputs.values()) or "none"
            raise EngineBuildError(
                f"{path}: the profile names input {name!r} of rank {len(low)}; the model has {known}.",
                path=str(path),
            )
