"""Compares two results of run.py: what NVIDIA's binding passes, jetrt must pass, and a wrong result must not get by.

    python tests/onnx_backend/compare.py binding.json jetrt.json [--refusals refusals.md]

Exit status 1 where a promise is broken. `--refusals` writes what jetrt does not run, grouped by reason.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]


def broken(binding: Results, jetrt: Results) -> list[str]:
    """Every promise that does not hold, as a sentence."""
    found = []
    for key in ("tensorrt", "onnx"):
        ours, theirs = jetrt["versions"].get(key), binding["versions"].get(key)
        # The binding's wheel has a number of three parts, the library four.
        if ours is None or theirs is None or ours.split(".")[:3] != theirs.split(".")[:3]:
            found.append(f"not comparable: {key} {theirs} and {ours}")
    for name, results in (("binding", binding), ("jetrt", jetrt)):
        if results["not run"]:
            found.append(f"{name}: {len(results['not run'])} cases were not run")
    for name in sorted(set(binding["cases"]) ^ set(jetrt["cases"])):
        found.append(f"{name}: in one of the two results only")
    for name, ours in jetrt["cases"].items():
        theirs = binding["cases"].get(name)
        if theirs and theirs["status"] == "pass" and ours["status"] != "pass":
            found.append(f"{name}: the binding passes; jetrt: {ours['status']}: {ours['reason']}")
        if ours["status"] == "wrong" and ours["gate"] in ("", "passed"):
            verdict = "let it pass" if ours["gate"] else "was not asked"
            found.append(f"{name}: wrong ({ours['reason']}), and the parity gate {verdict}")
        if ours["status"] in ("parser", "shape", "builder", "run") and not ours["error"]:
            found.append(f"{name}: refused without a typed error: {ours['reason']}")
    return found


def cross_table(binding: Results, jetrt: Results) -> list[str]:
    """How many cases ended how, for each pair of statuses."""
    pairs = collections.Counter(
        (theirs["status"], jetrt["cases"][name]["status"])
        for name, theirs in binding["cases"].items()
        if name in jetrt["cases"]
    )
    return [f"{count:5}  binding {theirs:8} jetrt {ours}" for (theirs, ours), count in pairs.most_common()]


def refusals(results: Results) -> str:
    """Markdown: what is not run, by reason; numbers and quoted names in a reason are one reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, result in results["cases"].items():
        if result["status"] != "pass":
            reason = re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "…", result["reason"]))
            groups.setdefault((result["status"], reason), []).append(name)
    versions = ", ".join(f"{key} {value}" for key, value in sorted(results["versions"].items()))
    lines = ["# Cases of the ONNX backend suite that do not pass", "", f"Written by compare.py; {versions}."]
    counts = ", ".join(f"{count} {status}" for status, count in results["counts"].items())
    lines += [f"Of {len(results['cases'])} cases: {counts}.", ""]
    for (status, reason), names in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]), group[0][1])):
        lines += [f"- **{status}**, {len(names)}: {reason.replace('|', '/')}", f"  ({', '.join(sorted(names))})"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binding", type=Path)
    parser.add_argument("jetrt", type=Path)
    parser.add_argument("--refusals", type=Path, metavar="FILE.md")
    arguments = parser.parse_args(argv)
    binding, jetrt = (json.loads(path.read_text()) for path in (arguments.binding, arguments.jetrt))
    print("\n".join(cross_table(binding, jetrt)))
    if arguments.refusals:
        arguments.refusals.write_text(refusals(jetrt))
    sentences = broken(binding, jetrt)
    print(f"\n{len(sentences)} promises broken" if sentences else "\nevery promise holds")
    print("\n".join(sentences))
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
