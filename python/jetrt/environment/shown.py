"""The environment for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..report import size, table
from .libraries import used_by_jetrt

if TYPE_CHECKING:
    from . import Environment

__all__ = ["text"]


def text(found: Environment) -> str:
    """Everything, in sections."""
    return "\n\n".join(f"{title}\n{table(rows[0], rows[1:])}" for title, rows in _sections(found) if rows)


def _sections(found: Environment) -> list[tuple[str, list[list[str]]]]:
    system, here, memory = found.system, found.platform, found.memory
    jetrt = found.jetrt
    machine = [
        ["system", f"{system.name or 'unknown'}, Linux {system.kernel or 'unknown'}, {here.arch}"],
        ["glibc", system.glibc or "unknown"],
        ["board", here.board or ""],
        ["Jetson Linux", f"{here.l4t}, JetPack {here.jetpack or 'unknown'}" if here.l4t else ""],
        ["power mode", (here.power_mode or "unknown") if found.tegra else ""],
        ["container", system.container or ""],
        *[["GPU", f"{gpu.name}{f' at {gpu.bus}' if gpu.bus else ''}"] for gpu in found.gpus],
        *([] if found.gpus else [["GPU", "no NVIDIA GPU found"]]),
        ["driver", here.driver or "none loaded"],
        *[["CUDA toolkit", f"{version} in {folder}"] for folder, version in system.toolkits.items()],
        ["memory", f"{size(memory.total)}, {size(memory.available)} of it available"],
        ["swap", size(memory.swap_total) + (f", {size(memory.zram_total)} of it zram" if memory.zram_total else "")],
        ["cgroup", f"at most {size(memory.cgroup_limit)}" if memory.cgroup_limit is not None else ""],
    ]
    python = [
        [
            "jetrt",
            f"{jetrt['version']}, {jetrt['profile']} build for {jetrt['target']}, runs TensorRT {jetrt['tensorrt']}",
        ],
        ["Python", f"{found.python.version}, {found.python.executable}"],
        [
            "venv",
            {True: "sees the system's packages", False: "does not see the system's packages", None: ""}[
                found.python.venv_sees_system
            ],
        ],
    ]
    used = used_by_jetrt(found.libraries)
    libraries = [
        [
            f"lib{lib.name}{f' (SM {lib.sm})' if lib.sm else ''}",
            lib.version or "unknown",
            f"{lib.path} ({lib.found_by}{', stub' if lib.stub else ''}{', used by jetrt' if lib is used else ''})",
        ]
        for lib in found.libraries
    ]
    packages = [[p.name, p.version or "unknown", p.folder] for p in found.packages.values()]
    hidden = [[p.name, p.version or "unknown", p.folder] for p in found.hidden_packages.values()]
    return [
        ("machine", [row for row in machine if row[1]]),
        ("python", [row for row in python if row[1]]),
        ("packages", packages),
        ("packages of the system's Python that this one does not see", hidden),
        ("Debian packages", [list(row) for row in found.system_packages.items()]),
        ("libraries", libraries or [["none of TensorRT or CUDA found", ""]]),
        ("switches", [list(row) for row in found.switches.items()]),
        ("environment variables", [list(row) for row in found.variables.items()]),
    ]
