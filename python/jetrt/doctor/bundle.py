"""One file with what a bug report to NVIDIA needs, without secrets, user names and home folders.

Texts alone: the plans themselves and models stay out, unless they are named with `--include`.
"""

from __future__ import annotations

import getpass
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ..environment import text
from ..environment.packages import all_packages
from ..environment.variables import SECRET_NAME, hide_tokens
from ..report import size
from .facts import Facts
from .finding import Report

__all__ = ["scrubber", "write_bundle"]

#: Files of the system that say what the board and its driver are. None has a serial number.
_FILES: Final = (
    *("etc/os-release", "etc/nv_tegra_release", "etc/nvpmodel.conf", "var/lib/nvpmodel/status"),
    *("proc/driver/nvidia/version", "proc/meminfo", "proc/swaps", "proc/version", "proc/buddyinfo"),
    *("proc/device-tree/model", "proc/device-tree/compatible", "usr/local/cuda/version.json"),
)
#: Lines of the kernel's log that matter.
_KERNEL: Final = re.compile(r"nvrm|nvgpu|nvmap|nvidia|xid|oom|out of memory|killed process|soctherm|throttl", re.I)
#: Names that are no person's, and would be taken out of half the text.
_COMMON: Final = frozenset(
    ("root", "user", "ubuntu", "nvidia", "jetson", "admin", "docker", "localhost", "home", "python", "cuda", "orin")
)
_TEXT_LIMIT: Final = 8 << 20

Scrub = Callable[[str], str]


def scrubber(environ: Mapping[str, str], *, user: str | None = None, host: str | None = None) -> Scrub:
    """A function that takes secrets, home folders, user and host names, e-mail addresses and MAC addresses out of a
    text. Secrets are the values of variables whose names say so, and what looks like a token."""
    secrets = sorted(
        {value for name, value in environ.items() if SECRET_NAME.search(name) and len(value) >= 6},
        key=len,
        reverse=True,
    )
    # Names may stand in JSON, where some characters are escaped.
    secrets += [escaped for value in secrets if (escaped := json.dumps(value)[1:-1]) != value]
    home = environ.get("HOME", "").rstrip("/")
    names = {name for name in (user, environ.get("USER"), environ.get("LOGNAME"), environ.get("SUDO_USER")) if name}
    names |= {Path(home).name} if home.startswith(("/home/", "/Users/")) else set()
    hosts = {name for name in (host, environ.get("HOSTNAME")) if name}

    def words(found: Iterable[str]) -> re.Pattern[str] | None:
        kept = sorted((re.escape(w) for w in found if len(w) >= 3 and w.lower() not in _COMMON), key=len, reverse=True)
        return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(kept)})(?![A-Za-z0-9])") if kept else None

    user_names, host_names = words(names), words(hosts)

    def scrub(content: str) -> str:
        for secret in secrets:
            content = content.replace(secret, "[hidden]")
        content = hide_tokens(content)
        # NAME=value and "NAME": "value" in logs and configurations.
        content = re.sub(
            r"(?i)\b(\w*(?:token|secret|passw(?:or)?d|api_?key|credential)\w*[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]{4,}",
            r"\1[hidden]",
            content,
        )
        if home and home not in ("/", "/root"):
            content = content.replace(home, "~")
        content = re.sub(r"(/home/|/Users/)[^/\s:\"']+", r"\1USER", content)
        content = re.sub(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b", "[e-mail]", content)
        content = re.sub(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", "[MAC]", content, flags=re.I)
        content = re.sub(r"\bGPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "[GPU UUID]", content, flags=re.I)
        content = user_names.sub("USER", content) if user_names else content
        return host_names.sub("HOST", content) if host_names else content

    return scrub


def write_bundle(
    path: str | os.PathLike[str],
    facts: Facts,
    report: Report,
    *,
    include: Iterable[str | os.PathLike[str]] = (),
    root: str | os.PathLike[str] = "/",
    search: Iterable[str] | None = None,
    scrub: Scrub | None = None,
) -> list[str]:
    """Writes `path` (.tar.gz) in one step and returns the names in it.

    `include`: further files, such as a build's log; what is text goes through the filter, the rest (a model) goes in as
    it is. `root`, `search` (instead of `sys.path`) and `scrub` are for tests. Raises OSError.
    """
    path = Path(path)
    scrub = scrub or scrubber(facts.environ, user=_user(), host=socket.gethostname())
    contents: dict[str, bytes] = {}

    def add(name: str, content: str) -> None:
        contents[name] = scrub(content).encode()

    add("REPORT.md", _report(facts, report))
    add("environment.txt", text(facts.environment) + "\n")
    add("environment.json", json.dumps(facts.environment.to_mapping(), indent=1))
    add("doctor.txt", report.text() + "\n")
    add("doctor.json", json.dumps(report.to_mapping(), indent=1))
    packages = all_packages(list(sys.path if search is None else search)).values()
    add(
        "packages.txt", "".join(f"{p.name}=={p.version or 'unknown'}\n" for p in sorted(packages, key=lambda p: p.name))
    )
    if facts.machine is not None:
        add("gpu.json", json.dumps(asdict(facts.machine), indent=1))
    for name in _FILES:
        found = _read(Path(root, name))
        if found is not None:
            add(f"system/{name}", found)
    add("system/kernel-log.txt", _kernel_log())
    add("plans.json", json.dumps([_plan(plan) for plan in facts.plans], indent=1))
    for number, given in enumerate(include):
        file = Path(given)
        data = file.read_bytes()
        name = f"included/{number}-{file.name}"
        if b"\0" in data[:8192] or len(data) > _TEXT_LIMIT:
            contents[name] = data
        else:
            add(name, data.decode(errors="replace"))
    _write(path, {scrub(name): content for name, content in contents.items()})
    return list(contents)


def _write(path: Path, contents: Mapping[str, bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    top = re.sub(r"\.(tar\.gz|tgz)$", "", path.name)
    try:
        # Owner and times of this machine stay out of the headers.
        with tarfile.open(temporary, "w:gz") as archive:
            for name, data in contents.items():
                info = tarfile.TarInfo(f"{top}/{name}")
                info.size, info.mode, info.mtime = len(data), 0o644, int(time.time())
                archive.addfile(info, io.BytesIO(data))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return None  # a container's user without a name


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(1 << 18).decode(errors="replace").replace("\0", "\n").strip("\n") + "\n"
    except OSError:
        return None


def _kernel_log() -> str:
    try:
        done = subprocess.run(
            ["dmesg", "--ctime"], capture_output=True, text=True, timeout=10, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernel's log cannot be read: {error}\n"
    if done.returncode:
        return f"the kernel's log cannot be read: {done.stderr.strip()}. Run `sudo dmesg` and add its lines.\n"
    lines = [line for line in done.stdout.splitlines() if _KERNEL.search(line)]
    return "\n".join(lines[-400:]) + "\n"


def _plan(plan: Any) -> dict[str, Any]:
    return {
        "file": plan.path.name,
        "tensorrt": plan.tensorrt,
        "problem": plan.problem or None,
        "manifest": None if plan.manifest is None else plan.manifest.to_mapping(),
    }


def _report(facts: Facts, report: Report) -> str:
    """The form that NVIDIA asks for, with the environment filled in."""
    here, machine = facts.environment, facts.machine
    gpu = here.gpus[0] if here.gpus else None
    sm = machine.sm if machine else gpu.sm if gpu else None
    tensorrt = [f"{lib.version or 'unknown'} ({lib.path})" for lib in here.libraries_of("nvinfer")]
    rows = {
        "Platform": here.platform.board or here.platform.arch,
        "GPU": machine.gpu if machine else gpu.name if gpu else "none found",
        "CUDA compute capability": f"{sm // 10}.{sm % 10}" if sm else "unknown",
        "SM count": str(machine.sm_count) if machine else "unknown",
        "GPU memory": size(machine.memory_bytes) if machine else "unknown",
        "Driver": here.platform.driver or "unknown",
        "Jetson Linux": here.platform.l4t or "none",
        "JetPack": here.platform.jetpack or "none",
        "Power mode": here.platform.power_mode or "unknown",
        "TensorRT": machine.tensorrt if machine else "; ".join(tensorrt) or "none found",
        "TensorRT libraries": "; ".join(tensorrt) or "none found",
        "CUDA (driver)": (machine.cuda if machine else None) or "unknown",
        "CUDA toolkits": ", ".join(here.system.toolkits.values()) or "none",
        "cuDNN": ", ".join(f"{lib.version}" for lib in here.libraries_of("cudnn")) or "none found",
        "torch": here.version_of("torch") or "none",
        "torch_tensorrt": here.version_of("torch-tensorrt") or "none",
        "onnx, onnxruntime": ", ".join(
            here.version_of(*names) or "none" for names in (("onnx",), ("onnxruntime", "onnxruntime-gpu"))
        ),
        "Python, numpy": f"{here.python.version}, {here.version_of('numpy') or 'none'}",
        "OS": f"{here.system.name}, Linux {here.system.kernel}",
        "Container": here.system.container or "no",
        "jetrt": str(here.jetrt.get("version")),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    findings = "\n".join(f"- {f.severity}: {f.id}: {f.what}" for f in report.findings) or "- none"
    return f"""# TensorRT issue

## Environment

| Component | Version |
|---|---|
{table}

Found by `jetrt doctor` on this machine:

{findings}

## Description

<!-- What happens, and what should. The exact message, with the lines before it. -->

## Relevant files

<!-- The ONNX model, or how to make one that shows it. `jetrt doctor --bundle … --include MODEL.onnx` puts one in. -->

## Steps to reproduce

<!-- Commands, `trtexec` too: NVIDIA asks whether the model can be run there. -->

## Workarounds tried

| Workaround | Result |
|---|---|
"""
