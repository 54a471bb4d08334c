"""Memory, swap, power mode, clocks, and what a cgroup allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..report import size
from .facts import Facts
from .finding import Finding

GIB: Final = 1 << 30
_UNIT: Final = "systemctl --user set-property --runtime $(basename $(cut -d: -f3 /proc/self/cgroup))"
_DROP: Final = "sync && echo 3 | sudo tee /proc/sys/vm/drop_caches"


def gpu_is_there(facts: Facts) -> Iterator[Finding]:
    if not facts.environment.gpus and facts.machine is None:
        yield Finding(
            "no-gpu",
            "note",
            "no NVIDIA GPU was found, neither on the bus nor of a Jetson",
            "plans cannot run here; the runtime onnx_cpu can",
            ("python3 -c 'import jetrt; print(jetrt.available_runtimes())'",),
        )


def free_memory(facts: Facts) -> Iterator[Finding]:
    memory, here = facts.environment.memory, facts.environment
    if memory.available is None or memory.total is None:
        return
    shared = bool(here.platform.integrated)
    least = max(GIB, memory.total // 10) if shared else GIB
    if memory.available >= least:
        return
    fix = [_DROP]
    if shared:
        fix.append("sudo systemctl isolate multi-user.target  # ends the desktop until `sudo systemctl start gdm3`")
    yield Finding(
        "memory-low",
        "warning",
        f"{size(memory.available)} of {size(memory.total)} can be had",
        "the GPU shares this memory: engines that do not fit are refused, or the kernel ends a program"
        if shared
        else "loading and building need host memory too",
        tuple(fix),
    )


def swap(facts: Facts) -> Iterator[Finding]:
    memory, here = facts.environment.memory, facts.environment
    on_disk = memory.swap_total - memory.zram_total
    # From 32 GiB on, a build on the device has been seen to do without.
    if not here.tegra or memory.total is None or memory.total > 20 * GIB or on_disk >= 4 * GIB:
        return
    zram = f"; {size(memory.zram_total)} of zram lie in the memory itself" if memory.zram_total else ""
    yield Finding(
        "swap-missing",
        "warning",
        f"the swap on disk is {size(max(on_disk, 0))}, with {size(memory.total)} of memory{zram}",
        "GPU memory cannot be swapped, but what other programs hold can: without swap a build is killed sooner",
        (
            "sudo systemctl disable --now nvzramconfig",
            "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon "
            "/swapfile",
            "echo '/swapfile none swap sw 0 0' | sudo tee -a /etc/fstab",
        ),
    )


def cgroup_memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.environment.memory
    if memory.cgroup_limit is None:
        return
    left = memory.cgroup_limit - (memory.cgroup_used or 0)
    tight = left < 1.5 * GIB
    yield Finding(
        "cgroup-memory",
        "warning" if tight else "note",
        f"the cgroup of this process allows {size(memory.cgroup_limit)} of {size(memory.total)}, {size(left)} are left",
        "what the machine calls available is not all to be had; a program above the limit is killed. GPU memory of a "
        "Jetson does not count against it",
        (
            "docker update --memory 0 --memory-swap 0 CONTAINER"
            if facts.environment.system.container
            else f"{_UNIT} MemoryMax=infinity",
        ),
    )


def cgroup_cpus(facts: Facts) -> Iterator[Finding]:
    cpus = facts.environment.memory.cgroup_cpus
    if cpus is not None and cpus < 2:
        yield Finding(
            "cgroup-cpus",
            "note",
            f"the cgroup of this process allows {cpus:g} CPUs",
            "builds take longer, and the host side of calls is paused when the share is used up",
            ("docker update --cpus 0 CONTAINER" if facts.environment.system.container else f"{_UNIT} CPUQuota=",),
        )


def power_mode(facts: Facts) -> Iterator[Finding]:
    here, power = facts.environment, facts.environment.power
    name = power.modes.get(power.mode) if power.mode is not None else None
    if not here.tegra or name is None or name.startswith("MAXN"):
        return
    best = max(((n.startswith("MAXN"), n, i) for i, n in power.modes.items()), default=(False, "", 0))
    fix = f"sudo nvpmodel -m {best[2]}  # {best[1]}" if best[0] else "sudo nvpmodel -p --verbose"
    yield Finding(
        "power-mode",
        "note",
        f"the power mode is {name}",
        "it caps clocks, and lower modes switch SMs off: figures of this mode are not those of the board, and a plan "
        "belongs to the number of SMs that it was built with",
        (fix,),
    )


def clocks(facts: Facts) -> Iterator[Finding]:
    power = facts.environment.power
    low, high = power.gpu_clock_min, power.gpu_clock_max
    if facts.environment.tegra and low is not None and high is not None and low < high:
        yield Finding(
            "jetson-clocks",
            "note",
            f"the GPU clock moves between {low / 1e6:.0f} and {high / 1e6:.0f} MHz",
            "a measurement depends on what ran before; with short calls the clock may never rise",
            ("sudo jetson_clocks",),
        )


CHECKS: Final = (gpu_is_there, free_memory, swap, cgroup_memory, cgroup_cpus, power_mode, clocks)
