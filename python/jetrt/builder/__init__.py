"""Building plans: `jetrt build` and `jetrt.build`.

The steps are in `pipeline`; each runs in a child process (`process`, `child`, `jobs`). What may be asked for is in
`options`, what TensorRT is told in `configure`, what is checked afterwards in `audit` and `parity`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .arrays import Array
    from .options import BuildOptions
    from .pipeline import BuildResult

__all__ = ["build"]


def build(
    onnx: str | os.PathLike[str],
    engine: str | os.PathLike[str] | None = None,
    *,
    options: BuildOptions | None = None,
    calibration_data: str | os.PathLike[str] | Iterable[Mapping[str, Array]] | None = None,
    progress: Literal["auto", "terminal", "notebook", "plain", "none"] = "auto",
    **more: Any,
) -> BuildResult:
    """Builds a plan from an ONNX file, checks it, and puts it under its name with a checksum and a manifest.

        result = jetrt.build("m.onnx", "m.engine", precision="fp16", min="x:1x3x224x224", opt="x:8x3x224x224")

    `engine` may be left out: the plan is then called ``<model>__sm<SM>_jp<JP>_trt<TRT>_<precision>.engine``, beside the
    model. Options are the keywords of `jetrt.builder.options.BuildOptions`, which are those of the command line; or one
    such record. `calibration_data` is for int8: an .npz file, a folder of images, or an iterable of mappings from input
    name to array. A plan that is there already and is the same is not built again (`BuildResult.built`).

    Raises `BuildOptionError` (before anything starts), `ModelError` (the ONNX file, or the parser's refusal),
    `CalibrationCacheError`, `BuildCrashError` (crash, out of memory, timeout, Ctrl-C), `PrecisionError`, `ParityError`,
    and `EngineBuildError` for the rest; then nothing is left on the disk.
    """
    from ..errors import BuildOptionError
    from .options import BuildOptions
    from .pipeline import build_plan
    from .progress import reporter

    if options is not None and more:
        raise BuildOptionError(f"options and {', '.join(more)} are both given: put all into options.")
    chosen = options if options is not None else BuildOptions.from_mapping(more, "jetrt.build")
    with reporter(progress) as shown:
        return build_plan(onnx, engine, chosen, calibration_data=calibration_data, reporter=shown)
