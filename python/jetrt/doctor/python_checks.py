"""Python and its packages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Final

from .facts import Facts
from .finding import Finding
from .versions import numbers


def _pip(facts: Facts, *words: str) -> str:
    python = facts.environment.python.executable or "python3"
    return shlex.join([python, "-m", "pip", *words])


def _numpy(facts: Facts) -> tuple[str, int] | None:
    package = facts.environment.packages.get("numpy")
    found = numbers(package.version) if package else ()
    return (package.version or "", found[0]) if package and found else None


def numpy_interface(facts: Facts) -> Iterator[Finding]:
    numpy = _numpy(facts)
    if numpy is None or numpy[1] < 2 or not facts.numpy1_modules:
        return
    modules = ", ".join(f"{extension.module} ({extension.file})" for extension in facts.numpy1_modules)
    yield Finding(
        "numpy-abi",
        "error",
        f"numpy is {numpy[0]}, and compiled for numpy 1 are: {modules}",
        "they fail at import or crash (`_ARRAY_API not found`). jetrt itself works with both",
        (_pip(facts, "install", "numpy<2"),),
    )


def numpy_requirements(facts: Facts) -> Iterator[Finding]:
    numpy = _numpy(facts)
    known = {extension.module for extension in facts.numpy1_modules}
    if numpy is None or not facts.unmet_requirements or (known and numpy[1] >= 2):
        return  # what is certain is told by `numpy_interface`
    packages = "; ".join(f"{entry.package} wants numpy {entry.text}" for entry in facts.unmet_requirements)
    yield Finding(
        "numpy-requirement",
        "warning",
        f"numpy is {numpy[0]}, and {packages}",
        "they were not made for this numpy, and may fail in places",
        (_pip(facts, "install", *(f"numpy{entry.text}" for entry in facts.unmet_requirements)),),
    )


def imports_that_fail(facts: Facts) -> Iterator[Finding]:
    for module, problem in facts.imports.items():
        if problem:
            fix = _pip(facts, "install", "numpy<2") if "numpy" in problem else _pip(facts, "check")
            yield Finding(
                "import-fails",
                "error",
                f"`import {module}` fails in a process of its own: {problem}",
                "whatever uses it fails the same way",
                (fix,),
            )


def venv_without_system_packages(facts: Facts) -> Iterator[Finding]:
    here = facts.environment
    users = facts.needed_by.get("tensorrt", ())
    hidden = [p for p in here.hidden_packages.values() if p.name == "tensorrt"]
    if here.python.venv_sees_system is not False or not hidden or "tensorrt" in here.packages:
        return
    yield Finding(
        "venv-without-system-packages",
        "warning" if users else "note",
        f"this virtual environment does not see tensorrt {hidden[0].version or ''} of {hidden[0].folder}"
        + (f", which {_listed(users)} use" if users else ""),
        "on a Jetson the `tensorrt` package comes by apt and cannot be installed with pip. jetrt does not need it",
        (
            f"python3 -m venv --system-site-packages --upgrade {shlex.quote(here.python.prefix)}",
            f"sed -i 's/^include-system-site-packages = .*/include-system-site-packages = true/' "
            f"{shlex.quote(here.python.prefix + '/pyvenv.cfg')}",
        ),
    )


def pycuda_is_there(facts: Facts) -> Iterator[Finding]:
    users = facts.needed_by.get("pycuda", ())
    if users and "pycuda" not in facts.environment.packages:
        yield Finding(
            "pycuda-missing",
            "warning",
            f"PyCUDA is not installed, and {_listed(users)} use it",
            "they stop at their import. jetrt does not need it",
            (_pip(facts, "install", "pycuda"),),
        )


def _listed(users: tuple[str, ...]) -> str:
    more = f" and {len(users) - 3} more" if len(users) > 3 else ""
    return ", ".join(users[:3]) + more


def torch_for_the_cpu(facts: Facts) -> Iterator[Finding]:
    here = facts.environment
    if facts.torch_has_cuda is not False or not here.gpus:
        return
    index = "https://download.pytorch.org/whl/cu126"
    if here.tegra:
        old = (here.platform.l4t or "").startswith("36.")
        index = "https://pypi.jetson-ai-lab.io/jp6/cu126" if old else "https://download.pytorch.org/whl/cu130"
    yield Finding(
        "torch-without-cuda",
        "warning",
        f"torch {here.version_of('torch') or ''} is a build without CUDA, and there is a GPU",
        "the runtimes pytorch_fp16 and torch_tensorrt cannot be had, and results cannot stay on the GPU",
        (_pip(facts, "install", "--force-reinstall", "torch", "--index-url", index),),
    )


#: Packages that put their files into one folder: what was installed last works, by parts.
_OVERLAPPING: Final = (
    (r"onnxruntime(-gpu|-openvino|-directml)?", "onnxruntime", "the providers of one of them are missing"),
    (r"opencv-(contrib-)?python(-headless)?", "cv2", "one of them is damaged, and uninstalling it damages the other"),
    (r"tensorrt-cu\d+-libs", "tensorrt_libs", "libraries of two builds lie in one folder"),
)


def overlapping_packages(facts: Facts) -> Iterator[Finding]:
    for pattern, folder, why in _OVERLAPPING:
        found = [name for name in facts.environment.packages if re.fullmatch(pattern, name)]
        if len(found) > 1:
            keep = found[-1]
            yield Finding(
                "overlapping-packages",
                "warning",
                f"{' and '.join(found)} are installed together",
                f"both install the folder {folder}: {why}",
                (
                    _pip(facts, "uninstall", "-y", *found),
                    _pip(facts, "install", keep),
                ),
            )


def externally_managed(facts: Facts) -> Iterator[Finding]:
    python = facts.environment.python
    if not python.externally_managed or python.venv_sees_system is not None or python.conda:
        return
    if facts.environ.get("PIP_BREAK_SYSTEM_PACKAGES"):
        return
    yield Finding(
        "externally-managed",
        "note",
        f"{python.executable} is the system's Python, into which pip refuses to install (PEP 668)",
        "packages go into a virtual environment, which must see the system's packages where TensorRT came by apt",
        ("python3 -m venv --system-site-packages .venv && . .venv/bin/activate",),
    )


CHECKS: Final = (
    numpy_interface,
    numpy_requirements,
    imports_that_fail,
    venv_without_system_packages,
    pycuda_is_there,
    torch_for_the_cpu,
    overlapping_packages,
    externally_managed,
)
