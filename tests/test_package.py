"""The package itself: what importing it needs and does, its version, its public names."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jetrt

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a fresh interpreter, away from the checkout."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd="/", capture_output=True, text=True, check=False
    )


def test_import_needs_numpy_alone():
    heavy = ["torch", "cupy", "jax", "onnx", "onnxruntime", "scipy", "PIL", "matplotlib", "ml_dtypes", "asyncio"]
    done = python(f"import sys, jetrt; print([m for m in {heavy} if m in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_import_opens_no_nvidia_library():
    done = python("import jetrt; print([l for l in open('/proc/self/maps') if 'nvinfer' in l or 'libcuda' in l])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_only_numpy_is_required():
    required = [line for line in importlib.metadata.requires("jetrt") or [] if "extra ==" not in line]
    assert required == ["numpy>=1.21"]


def test_import_without_the_extension_says_what_to_do():
    done = python("import sys; sys.modules['jetrt._core'] = None; import jetrt")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: jetrt's extension module jetrt._core could not be imported")
    assert "Install a wheel of jetrt" in last


def test_a_debug_build_warns_once_at_import():
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import jetrt
print(jetrt.build_info()["profile"], len(caught), *[w.category.__name__ for w in caught], *[w.message for w in caught])
"""
    profile = jetrt.build_info()["profile"]
    loud = python(code, JETRT_ALLOW_DEBUG="").stdout
    assert python(code, JETRT_ALLOW_DEBUG="1").stdout.split() == [profile, "0"]
    if profile == "release":
        assert loud.split() == ["release", "0"]
    else:
        assert loud.startswith(f"{profile} 1 RuntimeWarning jetrt._core is a debug build")
        assert "maturin develop --release" in loud


def test_version_is_the_crates():
    (version,) = re.findall(
        r'(?ms)^\[workspace\.package\]$.*?^version = "(.*?)"$', (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    )
    assert jetrt.__version__ == version == importlib.metadata.version("jetrt") == jetrt.build_info()["version"]


def test_build_info_says_how_it_was_built():
    info = jetrt.build_info()
    assert info["profile"] in ("release", "debug")
    assert re.fullmatch(r"(x86_64|aarch64)-unknown-linux-gnu", info["target"])
    assert re.fullmatch(r"rustc \d+\.\d+\.\d+.*", info["rustc"])
    assert info["python_abi"] == "abi3-py310"


@pytest.mark.parametrize("name", jetrt.__all__)
def test_public_names(name):
    assert getattr(jetrt, name) is not None
    assert name in dir(jetrt)


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'jetrt' has no attribute 'engine'"):
        _ = jetrt.engine


def test_classes_know_their_module():
    # pickle, help() and tracebacks go by it; a class of the extension has "builtins" unless told.
    for cls in (jetrt.Engine, jetrt.Tensor, jetrt.TensorInfo, jetrt.DeviceMemory):
        assert cls.__module__.startswith("jetrt"), cls


def test_types_are_shipped():
    package = Path(jetrt.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "_core.pyi").exists()
