"""Drop-ins for the TensorRT scripts of Isaac-GR00T and its forks. Needs torch.

python -m jetrt.groot standalone_inference_script.py ...  # a script that is not edited

from jetrt.groot import TensorRTDiTWrapper, replace_dit_with_tensorrt  # below the script's classes
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle, BundleError, MissingPlanError, check_bundle
    from .installing import install, undo
    from .loop import optimize
    from .preloading import load_report, preload
    from .replace import replace_backbone_with_tensorrt, replace_dit_with_tensorrt
    from .script import run_script
    from .wrappers import TensorRTBackboneWrapper, TensorRTDiTWrapper

__all__ = [
    "Bundle",
    "BundleError",
    "MissingPlanError",
    "TensorRTBackboneWrapper",
    "TensorRTDiTWrapper",
    "check_bundle",
    "install",
    "load_report",
    "optimize",
    "preload",
    "replace_backbone_with_tensorrt",
    "replace_dit_with_tensorrt",
    "run_script",
    "undo",
]

# Names that are imported when they are asked for, and the module that has them.
_LAZY = {
    **dict.fromkeys(("Bundle", "BundleError", "MissingPlanError", "check_bundle"), "bundle"),
    **dict.fromkeys(("install", "undo"), "installing"),
    "optimize": "loop",
    **dict.fromkeys(("load_report", "preload"), "preloading"),
    **dict.fromkeys(("replace_backbone_with_tensorrt", "replace_dit_with_tensorrt"), "replace"),
    "run_script": "script",
    **dict.fromkeys(("TensorRTBackboneWrapper", "TensorRTDiTWrapper"), "wrappers"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value  # asked once
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
