"""What it costs to know how hot the machine is: to who reads, to the threads that measure, to calls of an engine.

    python benches/thermal.py --engines FOLDER        # writes benches/results/thermal.json
    python benches/thermal.py --no-engine             # the first two alone, without a GPU

The last tables run the same calls in blocks of seconds without a monitor, with one at 1 Hz, which every program gets,
and with one at 100 Hz, which is there to show that a cost would be seen. Blocks come in a new order each round; what
counts is the difference of their means beside how much blocks without a monitor differ among themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    clocks,
    cpu_model,
    engines_folder,
    machine,
    markdown,
    plain,
    print_targets,
    python_block,
    summary,
    target,
    write,
)

import jetrt
from jetrt import thermal
from jetrt.thermal.nvml import NvmlSource
from jetrt.thermal.reading import Absent, Source
from jetrt.thermal.sysfs import SysfsSource

READS = 1000  # per sample: one read is too short for the clock
CALLS = 20  # between two looks at the time, on a drained GPU
MODES = {"no monitor": None, "monitor, 1 Hz": 1.0, "monitor, 100 Hz": 0.01}


def per_call(call: Callable[[], Any], samples: int = 500) -> dict[str, float]:
    """Nanoseconds of one call, the loop's own time taken off."""
    turns = range(READS)

    def timed(body: Callable[[], Any]) -> list[float]:
        found = []
        for _ in range(samples):
            start = time.perf_counter_ns()
            for _ in turns:
                body()
            found.append((time.perf_counter_ns() - start) / READS)
        return found

    start = time.perf_counter_ns()
    for _ in itertools.repeat(None, READS * samples):
        pass
    loop = (time.perf_counter_ns() - start) / (READS * samples)
    return summary([max(0.0, sample - loop) for sample in timed(call)])


def reading() -> dict[str, Any]:
    with thermal.ThermalMonitor() as monitor:
        return {
            "state()": per_call(monitor.state),
            "snapshot()": per_call(monitor.snapshot),
            "jetrt.thermal.monitor().state()": per_call(lambda: thermal.monitor().state()),
        }


def measuring(root: str) -> dict[str, Any]:
    """Microseconds of one look at each source, and the share of one core that all threads together take."""
    rows: dict[str, Any] = {}
    sources: list[Source] = [SysfsSource(root), NvmlSource(0)]
    for source in sources:
        try:
            source.sample()
        except Absent as reason:
            rows[source.name] = str(reason)
            continue
        samples = []
        for _ in range(200):
            start = time.perf_counter_ns()
            source.sample()
            samples.append((time.perf_counter_ns() - start) / 1e3)
        rows[source.name] = summary(samples)
    shares = {}
    for name, interval in MODES.items():
        with contextlib.ExitStack() as stack:
            if interval is not None:
                stack.enter_context(thermal.ThermalMonitor(root=root, interval_s=interval, log=False))
            time.sleep(1)  # started by now
            used, start = time.process_time(), time.monotonic()
            time.sleep(10)
            shares[name] = (time.process_time() - used) / (time.monotonic() - start)
    return {"look_us": rows, "share_of_a_core": shares}


def thor(folder: Path) -> str:
    """The files of an AGX Thor, which are the most, so that a look costs on any machine what it costs there, less the
    time of its firmware."""
    files = {}
    for n, kind in enumerate(("cpu", "gpu", "soc012", "soc345", "tj")):
        files |= {f"thermal/thermal_zone{n}/type": f"{kind}-thermal", f"thermal/thermal_zone{n}/temp": "50125"}
    coolers = [f"cpufreq-cpu{n}" for n in range(13)] + ["devfreq-gpu-gpc-0", "devfreq-gpu-nvd-0", "pwm-fan"]
    coolers += [f"{kind}-throttle-alert" for kind in ("cpu", "gpu", "soc012", "soc345")]
    for n, kind in enumerate(coolers):
        files |= {f"thermal/cooling_device{n}/type": kind, f"thermal/cooling_device{n}/cur_state": "0"}
    for n, label in enumerate(("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), 1):
        files |= {f"hwmon/hwmon0/in{n}_{k}": v for k, v in (("label", label), ("input", "20000"))}
        files[f"hwmon/hwmon0/curr{n}_input"] = "1500"
    files |= {"hwmon/hwmon0/name": "ina3221", "hwmon/hwmon1/name": "ina238", "hwmon/hwmon1/power1_input": "30000000"}
    files |= {"hwmon/hwmon2/name": "soctherm_oc"} | {f"hwmon/hwmon2/oc{n}_event_cnt": "0" for n in (1, 2, 3)}
    for name in ("gpu-gpc-0", "gpu-nvd-0", "bwmgr"):
        files |= {f"devfreq/{name}/cur_freq": "1574000000", f"devfreq/{name}/max_freq": "1575000000"}
    for name, text in files.items():
        path = folder / "sys/class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return str(folder)


def calling(folder: Path, graphs: str, rounds: int, seconds: float) -> dict[str, Any]:
    import torch
    from host_cost import dit5_inputs, keyword_call

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), jetrt.Engine(folder / "dit5.engine", graphs=graphs) as engine:
        call = keyword_call(engine, [dit5_inputs(122)])
        for _ in range(100):
            call()
        block = python_block(call, torch.cuda.synchronize)
        means: dict[str, list[float]] = {name: [] for name in MODES}
        samples: dict[str, list[int]] = {name: [] for name in MODES}
        before = clocks()
        order, shuffle = list(MODES), random.Random(0).shuffle
        for turn in range(rounds + 1):
            shuffle(order)
            for name in order:
                found: list[int] = []
                interval = MODES[name]
                with contextlib.ExitStack() as stack:
                    if interval is not None:
                        stack.enter_context(thermal.ThermalMonitor(interval_s=interval, log=False))
                    end = time.monotonic() + seconds
                    while time.monotonic() < end:
                        found.extend(block(CALLS))
                if turn > 0:  # the first round warms up
                    means[name].append(statistics.fmean(found))
                    samples[name].extend(found)
        after = clocks()
    return {
        "unit": "ns of host time per call",
        "rows": {name: {**summary(found), "mean": statistics.fmean(found)} for name, found in samples.items()},
        "block_means": means,
        "clocks": {"before": before, "after": after},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines")
    parser.add_argument("--no-engine", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", default="thermal")
    options = parser.parse_args()

    reads = reading()
    with tempfile.TemporaryDirectory() as folder:
        costs = {"this machine": measuring("/"), "the files of an AGX Thor": measuring(thor(Path(folder)))}
    result: dict[str, Any] = {"reading_ns": reads, "measuring": costs}
    targets = [target("state() from Python, median", reads["state()"]["median"] / 1e3, 1.0, "µs")]
    print(markdown(["read, ns", "min", "median", "p99"], [[n, *figures(r, 1)] for n, r in reads.items()]))
    looks = [
        [f"{where}: {name}", *(figures(row, 1) if isinstance(row, dict) else [row, "", ""])]
        for where, cost in costs.items()
        for name, row in cost["look_us"].items()
    ]
    print()
    print(markdown(["one look, µs", "min", "median", "p99"], looks))
    shares = [[where, *(f"{100 * s:.3f} %" for s in cost["share_of_a_core"].values())] for where, cost in costs.items()]
    print()
    print(markdown(["share of one core", *MODES], shares))
    if options.no_engine:
        result["machine"] = {"cpu": cpu_model(), "jetrt": plain(jetrt.build_info())}
    else:
        folder_ = engines_folder(options.engines)
        result["machine"] = machine()
        result["calls"] = {
            name: calling(folder_, graphs, options.rounds, options.seconds)
            for name, graphs in (("eager", "off"), ("graph", "auto"))
        }
        for name, table in result["calls"].items():
            rows = [[n, *figures(row, 1e3), f"{row['mean'] / 1e3:.2f}"] for n, row in table["rows"].items()]
            print()
            print(markdown([f"engine call, {name}, µs", "min", "median", "p99", "mean"], rows))
            off = table["block_means"]["no monitor"]
            more = statistics.median(table["block_means"]["monitor, 1 Hz"]) - statistics.median(off)
            spread = max(off) - min(off)
            targets.append(target(f"{name}: 1 Hz adds, against blocks' spread", more / 1e3, spread / 1e3, "µs"))
    result["targets"] = targets
    print_targets(targets)
    print(f"\nwritten to {write(options.out, result).name}")


def figures(row: dict[str, float], scale: float) -> list[str]:
    return [f"{row[key] / scale:.2f}" for key in ("min", "median", "p99")]


if __name__ == "__main__":
    main()
