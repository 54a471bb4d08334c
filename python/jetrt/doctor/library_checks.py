"""CUDA's and TensorRT's libraries: which there are, and whether they belong together."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Final

from ..environment import Library, used_by_jetrt, used_by_loader
from .facts import Facts
from .finding import Finding
from .versions import differ, numbers

#: CUDA major -> the oldest driver that runs it (NVIDIA's table of minor version compatibility).
_DRIVERS: Final = {11: 450, 12: 525, 13: 580}


def tensorrt_is_there(facts: Facts) -> Iterator[Finding]:
    here = facts.environment
    if not here.gpus or used_by_jetrt(here.libraries):
        return
    found = here.libraries_of("nvinfer")
    if found:
        versions = ", ".join(f"{lib.version or 'an unknown version'} in {lib.folder}" for lib in found)
        yield Finding(
            "tensorrt-unsupported",
            "error",
            f"the only TensorRT is {versions}",
            "jetrt runs plans of TensorRT 10 and 11; JetPack 6.0 and older have 8",
            _install(facts),
        )
    else:
        yield Finding(
            "tensorrt-missing",
            "error",
            "there is a GPU and no libnvinfer, neither of a pip package nor of the system",
            "plans can be neither run nor built",
            _install(facts),
        )


def _install(facts: Facts) -> tuple[str, ...]:
    here = facts.environment
    if here.tegra:
        major = numbers(here.platform.l4t)[:2]
        if major and major < (36, 4):
            return (
                "# flash JetPack 6.1 or newer, which has TensorRT 10: https://developer.nvidia.com/embedded/jetpack",
            )
        return ("sudo apt-get update && sudo apt-get install -y tensorrt",)
    driver = numbers(here.platform.driver)
    cuda = "cu13" if driver and driver[0] >= _DRIVERS[13] else "cu12"
    return (f"{_python(facts)} -m pip install tensorrt-{cuda}-libs",)


def _python(facts: Facts) -> str:
    return shlex.quote(facts.environment.python.executable or "python3")


def binding_and_library(facts: Facts) -> Iterator[Finding]:
    packages, libraries = facts.environment.packages, facts.environment.libraries
    bindings = next((p for n, p in packages.items() if re.fullmatch(r"tensorrt-(cu\d+-)?bindings", n)), None)
    binding = bindings or packages.get("tensorrt")
    if binding is None or binding.version is None:
        return
    bundled = next((p for n, p in packages.items() if re.fullmatch(r"tensorrt-(cu\d+-)?libs", n)), None)
    if bundled is not None:
        found, where = bundled.version, f"the package {bundled.name}"
        fix = f"{_python(facts)} -m pip install --force-reinstall --no-deps {bundled.name}=={binding.version}"
    else:
        major = numbers(binding.version)[0] if numbers(binding.version) else None
        library = used_by_loader(libraries, "nvinfer", major) or used_by_loader(libraries, "nvinfer")
        if library is None:
            return
        found, where = library.version, library.path
        fix = f"export LD_LIBRARY_PATH={_without(facts, library)}"
        if library.found_by != "LD_LIBRARY_PATH":
            fix = "sudo apt-get install -y --reinstall tensorrt python3-libnvinfer"
    if differ(binding.version, found):
        yield Finding(
            "tensorrt-binding-and-library",
            "error",
            f"the Python package {binding.name} is {binding.version} and the library that it would use is {found} "
            f"({where})",
            "a binding calls the library by the layout of its own version: plans fail to load, or the process crashes. "
            "jetrt itself does not use the binding",
            (fix,),
        )


def _without(facts: Facts, library: Library) -> str:
    folder = library.path.rpartition("/")[0]
    kept = [part for part in facts.environ.get("LD_LIBRARY_PATH", "").split(":") if part and part != folder]
    return shlex.quote(":".join(kept)) if kept else '""'


def parser_beside_library(facts: Facts) -> Iterator[Finding]:
    """jetrt takes parser and plugins from libnvinfer's own folder; other programs take what the loader finds."""
    libraries = facts.environment.libraries
    used = used_by_jetrt(libraries)
    parsers = [lib for lib in libraries if lib.name == "nvonnxparser" and used and lib.major == used.major]
    if used is not None and parsers and all(lib.folder != used.folder for lib in parsers):
        yield Finding(
            "parser-elsewhere",
            "warning",
            f"jetrt uses {used.path}, and libnvonnxparser is not beside it but in {parsers[0].folder}",
            "`jetrt build` refuses a parser of another folder, since it may be of another TensorRT; plans run",
            (f"export JETRT_TENSORRT_PATH={shlex.quote(parsers[0].path.rpartition('/')[0])}",),
        )
    first = used_by_loader(libraries, "nvinfer")
    for name in ("nvonnxparser", "nvinfer_plugin"):
        other = first and used_by_loader(libraries, name, first.major)
        if first and other and first.folder != other.folder and differ(first.version, other.version):
            yield Finding(
                "mixed-tensorrt",
                "error",
                f"programs get {first.path} ({first.version}) together with {other.path} ({other.version})",
                "a parser or plugin library of another version fails with `Magic tag does not match`, or crashes. "
                "jetrt itself takes all of them from one folder",
                (f"export LD_LIBRARY_PATH={shlex.quote(first.path.rpartition('/')[0])}",),
            )


def builder_resource(facts: Facts) -> Iterator[Finding]:
    here = facts.environment
    used = used_by_jetrt(here.libraries)
    if used is None or not any(lib.name == "nvonnxparser" and lib.folder == used.folder for lib in here.libraries):
        return  # an installation for running plans alone
    resources = [lib for lib in here.libraries_of("nvinfer_builder_resource") if lib.folder == used.folder]
    sm = facts.machine.sm if facts.machine else next((gpu.sm for gpu in here.gpus), None)
    why = "TensorRT 10 and newer load it when a plan is built and fail without it; running plans works"
    if not resources:
        what = f"there is no libnvinfer_builder_resource beside {used.path}"
    elif all(differ(lib.version, used.version) for lib in resources):
        what = f"{resources[0].path} is of {resources[0].version} and libnvinfer of {used.version}"
    elif sm is not None and not any(_serves(lib.sm, sm) for lib in resources):
        there = ", ".join(f"SM {lib.sm}" for lib in resources)
        what = f"the builder resources beside {used.path} are for {there}, and this GPU has SM {sm}"
    else:
        return
    yield Finding("builder-resource-missing", "warning", what, why, _install(facts))


def _serves(resource: int | None, sm: int) -> bool:
    """One without an SM serves every GPU; that of SM 86 serves Orin (87) too."""
    return resource is None or (resource // 10 == sm // 10 and resource <= sm)


def stub_libcuda(facts: Facts) -> Iterator[Finding]:
    stubs = [lib for lib in facts.environment.libraries_of("cuda") if lib.stub and lib.loader_rank is not None]
    if not stubs:
        return
    real = [lib for lib in facts.environment.libraries_of("cuda") if not lib.stub]
    yield Finding(
        "stub-libcuda",
        "error" if stubs[0].path.endswith(".so.1") or not real else "warning",
        f"the loader finds {stubs[0].path}, which is a stub to link programs with",
        "a program that gets it sees no GPU or a wrong amount of memory (`Tactic Device request: … Available: …`); "
        "jetrt asks for libcuda.so.1 only",
        (f"export LD_LIBRARY_PATH={_without(facts, stubs[0])}",),
    )


def libcuda_is_there(facts: Facts) -> Iterator[Finding]:
    here = facts.environment
    if not here.gpus or any(not lib.stub for lib in here.libraries_of("cuda")):
        return
    if here.system.container:
        asked = facts.environ.get("NVIDIA_VISIBLE_DEVICES", "")
        nothing = asked.strip().lower() in ("", "void", "none")
        what = "this container has no libcuda.so.1" + (
            f", and NVIDIA_VISIBLE_DEVICES is {asked!r}" if asked else ", and NVIDIA_VISIBLE_DEVICES is not set"
        )
        options = "--runtime nvidia -e NVIDIA_VISIBLE_DEVICES=all" if here.tegra else "--gpus all"
        fix = [f"docker run {options} -e NVIDIA_DRIVER_CAPABILITIES=compute,utility IMAGE"]
        if not nothing:
            fix.append("sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker")
        yield Finding(
            "container-without-gpu",
            "error",
            what,
            "NVIDIA's container runtime puts the driver's libraries in only where the container asks for GPUs",
            tuple(fix),
        )
        return
    package = "nvidia-l4t-cuda" if here.tegra else "nvidia-driver-580"
    yield Finding(
        "libcuda-missing",
        "error",
        "there is a GPU and no libcuda.so.1, which comes with the driver",
        "nothing can use the GPU without it",
        (f"sudo apt-get install -y {package}",),
    )


def libcuda_of_the_driver(facts: Facts) -> Iterator[Finding]:
    driver = facts.environment.platform.driver
    library = next((lib for lib in facts.environment.libraries_of("cuda") if not lib.stub), None)
    if library is None or "compat" in library.path or len(numbers(library.version)) < 2 or facts.environment.tegra:
        return
    if driver and differ(driver, library.version, depth=4):
        yield Finding(
            "driver-and-libcuda",
            "error",
            f"the kernel has the driver {driver} loaded, and {library.path} is of {library.version}",
            "the driver was updated while it ran: CUDA and NVML fail (`Driver/library version mismatch`)",
            ("sudo reboot",),
        )


def driver_age(facts: Facts) -> Iterator[Finding]:
    here = facts.environment
    driver = numbers(here.platform.driver)
    cuda = used_by_loader(here.libraries, "cuda")
    if not driver or (cuda is not None and "compat" in cuda.path):
        return  # with the forward-compatibility package in use, the kernel's driver says nothing
    for what, major in _cuda_majors(facts):
        oldest = _DRIVERS.get(major)
        if oldest is not None and driver[0] < oldest:
            fix = "sudo apt-get install -y nvidia-driver-580 && sudo reboot"
            if here.tegra:
                fix = "# flash a newer JetPack: the driver comes with it. Or install the build for CUDA 12"
            yield Finding(
                "driver-too-old",
                "error",
                f"{what} needs CUDA {major}, so a driver from {oldest} on, and {here.platform.driver} is loaded",
                "CUDA fails to start (`CUDA driver version is insufficient for CUDA runtime version`)",
                (fix,),
            )
            return


def _cuda_majors(facts: Facts) -> Iterator[tuple[str, int]]:
    here = facts.environment
    for name, package in here.packages.items():
        match = re.fullmatch(r"(?:tensorrt|nvidia-cuda-runtime)-cu(\d+)(?:-.*)?", name)
        if match:
            yield f"the package {name}", int(match[1])
        elif name == "nvidia-cuda-runtime":
            yield f"the package {name}", numbers(package.version)[0] if numbers(package.version) else 0
        elif name == "torch" and (match := re.search(r"\+cu(\d\d)\d", package.version or "")):
            yield f"torch {package.version}", int(match[1])
    for name, version in here.system_packages.items():
        if name.startswith("libnvinfer") and (match := re.search(r"\+cuda(\d+)", version)):
            yield f"the package {name}", int(match[1])


CHECKS: Final = (
    tensorrt_is_there,
    libcuda_is_there,
    libcuda_of_the_driver,
    driver_age,
    stub_libcuda,
    binding_and_library,
    parser_beside_library,
    builder_resource,
)
