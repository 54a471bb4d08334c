"""Runs the ONNX backend test suite of the package `onnx` on TensorRT.

    python tests/onnx_backend/run.py --executor jetrt --workers 14 --out jetrt.json
    python tests/onnx_backend/run.py --executor binding --workers 14 --out binding.json
    python tests/onnx_backend/compare.py binding.json jetrt.json

A worker that builds takes about 5 GB of host memory. `--resume` keeps what --out holds already and runs the rest, for
machines that are lent in slices of time (`--seconds`).
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cases import collect
from executors import EXECUTORS
from pool import PoolError, run_all


def parse(argv: Sequence[str] | None, executors: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=executors, required=True)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--cases", metavar="REGEX", help="only the cases in whose name it is found")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N cases")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds for one case (120)")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no case after that")
    parser.add_argument("--resume", action="store_true", help="keep the results that are in --out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, executors: Any = EXECUTORS) -> int:
    arguments = parse(argv, executors)
    start = time.monotonic()
    cases = [case for case in collect() if re.search(arguments.cases or "", case.name)][: arguments.limit]
    done: dict[str, Any] = {}
    before = 0.0
    if arguments.resume and arguments.out.exists():
        stored = json.loads(arguments.out.read_text())
        done, before = stored["cases"], stored["seconds"]
    about: dict[str, Any] = {"onnx": onnx.__version__, "numpy": np.__version__, "workers": arguments.workers}
    counts: collections.Counter[str] = collections.Counter(result["status"] for result in done.values())
    failure = None
    waiting = [case for case in cases if case.name not in done]
    print(f"{len(waiting)} of {len(cases)} cases, {arguments.executor}", flush=True)
    try:
        results = run_all(
            waiting,
            executors[arguments.executor],
            workers=arguments.workers,
            timeout=arguments.timeout,
            budget=arguments.seconds,
            about=about,
        )
        for case, result in results:
            done[case.name] = {"kind": case.kind, **asdict(result)}
            counts[result.status] += 1
            if sum(counts.values()) % 100 == 0:
                print(f"{time.monotonic() - start:6.0f} s  {summary(counts)}", flush=True)
    except PoolError as error:
        failure = str(error)
    finally:  # whatever happened, what was found out is kept
        report = {
            "versions": about,
            "seconds": round(before + time.monotonic() - start, 1),
            "counts": dict(sorted(counts.items())),
            "not run": sorted({case.name for case in cases} - set(done)),
            "cases": dict(sorted(done.items())),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(
        f"{report['seconds']:6.0f} s  {summary(counts)}; {len(report['not run'])} not run; written to {arguments.out}"
    )
    if failure:
        print(failure, file=sys.stderr)
    return 1 if failure else 0


def summary(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "no results"


if __name__ == "__main__":
    sys.exit(main())
