"""Peak host memory while a large plan is loaded, above what the process had before.

    python benches/make_large_plan.py large.engine
    python benches/load_memory.py large.engine --engines FOLDER     # writes benches/results/load_memory.json

Each way of loading runs in a process of its own, which first loads a small plan (so that the libraries, the CUDA
context and TensorRT's own tables are there already); this process reads its /proc status every millisecond. Anonymous
and shared memory cannot be reclaimed by the kernel; pages of a mapped file can, so they are reported apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

from common import engines_folder, machine, markdown, print_targets, target, write

WAYS = {
    "jetrt": """
        import jetrt
        small = jetrt.Engine(sys.argv[2])
        start()
        engine = jetrt.Engine(sys.argv[1])
        finish(engine.load_report)
    """,
    "binding, open().read()": """
        try:
            import tensorrt as trt
        except ImportError:
            import tensorrt_bindings as trt
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        small = runtime.deserialize_cuda_engine(open(sys.argv[2], "rb").read())
        keep = small.create_execution_context()
        start()
        engine = runtime.deserialize_cuda_engine(open(sys.argv[1], "rb").read())
        context = engine.create_execution_context()
        finish({})
    """,
}

PRELUDE = """
import json, sys, time

def start():
    global begun
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()

def finish(report):
    print(json.dumps({"seconds": time.perf_counter() - begun, "report": report}, default=str), flush=True)
    sys.stdin.readline()
"""

LIMIT = 128 << 20


def memory(pid: int) -> dict[str, int]:
    wanted = {"RssAnon": "anonymous", "RssShmem": "shared", "RssFile": "file", "VmLck": "locked"}
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in wanted:
            found[wanted[key]] = int(rest.split()[0]) * 1024
    return found


def fixed(m: dict[str, int]) -> int:
    return m["anonymous"] + m["shared"]


def measure(code: str, plan: Path, small: Path) -> dict[str, Any]:
    child = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(plan), str(small)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    line = child.stdout.readline()
    while line and line != "ready\n":  # the libraries may have something to say first
        line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"the child failed with {child.wait()}")
    before = memory(child.pid)
    answer: list[str] = []
    reader = threading.Thread(target=lambda: answer.append(child.stdout.readline()))
    reader.start()
    child.stdin.write("\n")
    child.stdin.flush()
    peak, peak_file, samples = fixed(before), before["file"], 0
    while reader.is_alive():
        now = memory(child.pid)
        if not now:  # a zombie has no memory; its pipe is about to say so
            break
        peak, peak_file, samples = max(peak, fixed(now)), max(peak_file, now["file"]), samples + 1
        time.sleep(0.001)
    reader.join()
    if not answer[0]:
        raise RuntimeError(f"the child failed with {child.wait()}")
    after = memory(child.pid)
    child.stdin.write("\n")
    child.stdin.close()
    child.wait()
    return {
        **json.loads(answer[0]),
        "peak_above_start": peak - fixed(before),
        "peak_of_mapped_files_above_start": peak_file - before["file"],
        "kept": fixed(after) - fixed(before),
        "kept_of_mapped_files": after["file"] - before["file"],
        "start": before,
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--engines")
    parser.add_argument("--out", default="load_memory")
    args = parser.parse_args()
    small = engines_folder(args.engines) / "mlp.engine"
    rows, skipped = {}, {}
    for name, code in WAYS.items():
        try:
            rows[name] = measure(code, args.plan, small)
        except RuntimeError as error:
            skipped[name] = str(error)
    targets = []
    if "jetrt" in rows:
        name = "peak of memory that the kernel cannot reclaim, above the process before"
        targets.append(target(name, rows["jetrt"]["peak_above_start"] / 2**20, LIMIT / 2**20, "MiB"))
    result = {
        "machine": machine(),
        "plan_bytes": args.plan.stat().st_size,
        "rows": rows,
        "skipped": skipped,
        "targets": targets,
    }
    path = write(args.out, result)
    keys = ("peak_above_start", "peak_of_mapped_files_above_start", "kept", "kept_of_mapped_files")
    table = [
        [name, f"{row['seconds']:.2f}", *(f"{row[key] / 2**20:.0f}" for key in keys)] for name, row in rows.items()
    ]
    print(f"plan: {result['plan_bytes'] / 1e9:.2f} GB\n")
    print(markdown(["loaded by", "seconds", *(key.replace("_", " ") + ", MiB" for key in keys)], table))
    for name, reason in skipped.items():
        print(f"\nnot run: {name}: {reason}")
    print_targets(targets)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
