"""Environment variables that matter here, and never one that could hold a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["SECRET_NAME", "hide_tokens", "shown_variables", "switches"]

_PREFIXES: Final = (
    *("CUDA_", "CUDNN_", "CUPY_", "JETRT_", "NCCL_", "NVIDIA_", "OMP_", "OPENBLAS_", "ORT_", "PYTORCH_"),
    *("TENSORRT_", "TORCH_", "TRT_"),
)
_NAMES: Final = frozenset(
    (
        *("CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "PIP_BREAK_SYSTEM_PACKAGES", "PYTHONHOME", "PYTHONPATH"),
        "VIRTUAL_ENV",
    )
)

#: Names of variables whose values are secrets: `NVIDIA_API_KEY`, `TORCH_HUB_TOKEN`.
SECRET_NAME: Final = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|API_?KEY|_KEY$|^KEY|CREDENTIAL|AUTH|COOKIE|SESSION|PRIVATE|SIGNATURE|WEBHOOK|_DSN$",
    re.I,
)
#: What tokens look like: user and password of a URL, JSON Web Tokens, keys of well-known services, PEM blocks.
_TOKEN: Final = re.compile(
    r"(?<=://)[^/\s:@]+(?::[^/\s@]*)?(?=@)"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|\b(?:nvapi-|hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA|AIza)[\w-]{12,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?i:\bbearer\s+)[\w.~+/-]{8,}=*"
    r"|(?i:(?<=[?&])(?:token|key|sig|signature|password|x-amz-[\w-]+)=)[^&\s]+",
    re.S,
)

HIDDEN: Final = "[hidden]"
_SWITCH: Final = re.compile(r"(?i:on|off|true|false|yes|no|0|1)?")


def shown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that change how CUDA, TensorRT, torch or jetrt work, with their values."""
    return {
        name: hide_tokens(value)
        for name, value in sorted(environ.items())
        if (name in _NAMES or name.startswith(_PREFIXES)) and not SECRET_NAME.search(name)
    }


def switches(environ: Mapping[str, str]) -> dict[str, str]:
    """`BUILD_*` variables. Build servers have others of that name, so that only what is a switch is shown."""
    return {
        name: value if _SWITCH.fullmatch(value) else HIDDEN
        for name, value in sorted(environ.items())
        if name.startswith("BUILD_") and not SECRET_NAME.search(name)
    }


def hide_tokens(text: str) -> str:
    """The text without what looks like a token."""
    return _TOKEN.sub(HIDDEN, text)
