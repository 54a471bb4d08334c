"""Compares two results of run.py: what NVIDIA's binding passes, jetrt must pass, and a wrong result must not get by.

    python tests/onnx_backend/compare.py binding.json jetrt.json [--again binding_again.json] \\
        [--refusals refusals.md] [--summary onnx_backend.json --machine "one NVIDIA H200"]

Exit status 1 where a promise is broken. `--again` is a later run of some of the binding's cases, whose results take the
place of the first ones. `--refusals` writes what jetrt does not run, grouped by reason; `--summary` the counts and
versions, the wrong results with what the parity gate says of them, and the promises that are broken.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import json
import re
import sys
import textwrap
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
        refused = ours["status"] in ("parser", "shape", "builder", "run")
        if refused and (not ours["error"] or hasattr(builtins, ours["error"])):
            found.append(f"{name}: refused without a typed error: {ours['error']} {ours['reason']}".replace("  ", " "))
    return found


def cross_table(binding: Results, jetrt: Results) -> list[str]:
    """How many cases ended how, for each pair of statuses."""
    pairs = collections.Counter(
        (theirs["status"], jetrt["cases"][name]["status"])
        for name, theirs in binding["cases"].items()
        if name in jetrt["cases"]
    )
    return [f"{count:5}  binding {theirs:8} jetrt {ours}" for (theirs, ours), count in pairs.most_common()]


def replaced(results: Results, again: Results) -> dict[str, Any]:
    """The results with those of a later run in their place."""
    cases = {**results["cases"], **again["cases"]}
    counts = collections.Counter(case["status"] for case in cases.values())
    return {**results, "cases": cases, "counts": dict(sorted(counts.items())), "again": sorted(again["cases"])}


def summary(binding: Results, jetrt: Results, machine: str | None) -> dict[str, Any]:
    """What is kept of the two results."""
    kept = {}
    for name, results in (("jetrt", jetrt), ("binding", binding)):
        kept[name] = {key: results[key] for key in ("versions", "seconds", "counts", "again") if key in results}
    wrong = {
        name: {
            "reason": case["reason"],
            "binding": binding["cases"].get(name, {}).get("status"),
            # Without the advice at its end.
            "gate": re.split(r"(?<=\.) (?:fp32 rounds|An index of)", case["gate"])[0],
        }
        for name, case in jetrt["cases"].items()
        if case["status"] == "wrong"
    }
    return {
        "machine": machine,
        "cases": len(jetrt["cases"]),
        **kept,
        "pairs": [line.strip() for line in cross_table(binding, jetrt)],
        "wrong": wrong,
        "broken promises": broken(binding, jetrt),
    }


def grouped(reason: str) -> str:
    """Numbers and quoted names in a reason are one reason; types (Int8) and quoted sentences stay."""
    reason = re.sub(r"'[^'\s]*'|\"[^\"\s]*\"", "…", reason)
    return re.sub(r"(?<![A-Za-z\d])\d+(\.\d+)?(e-?\d+)?", "N", reason.removeprefix(": ")).replace("|", "/")


def refusals(results: Results) -> str:
    """Markdown: what does not pass, by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, result in results["cases"].items():
        if result["status"] != "pass":
            groups.setdefault((result["status"], grouped(result["reason"])), []).append(name)
    versions = ", ".join(f"{key} {value}" for key, value in sorted(results["versions"].items()))
    lines = ["# Cases of the ONNX backend suite that do not pass", "", f"Written by compare.py; {versions}."]
    counts = ", ".join(f"{count} {status}" for status, count in results["counts"].items())
    lines += [f"Of {len(results['cases'])} cases: {counts}.", ""]
    for (status, reason), names in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]), group[0][1])):
        lines.append(f"- **{status}**, {len(names)}: {reason}")
        listed = f"({', '.join(sorted(names))})"
        lines += textwrap.wrap(listed, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binding", type=Path)
    parser.add_argument("jetrt", type=Path)
    parser.add_argument("--again", type=Path, metavar="FILE.json")
    parser.add_argument("--refusals", type=Path, metavar="FILE.md")
    parser.add_argument("--summary", type=Path, metavar="FILE.json")
    parser.add_argument("--machine", metavar="TEXT", help="where it ran, for the summary: the results do not say")
    arguments = parser.parse_args(argv)
    binding, jetrt = (json.loads(path.read_text()) for path in (arguments.binding, arguments.jetrt))
    if arguments.again:
        binding = replaced(binding, json.loads(arguments.again.read_text()))
    print("\n".join(cross_table(binding, jetrt)))
    if arguments.refusals:
        arguments.refusals.write_text(refusals(jetrt))
    if arguments.summary:
        text = json.dumps(summary(binding, jetrt, arguments.machine), indent=1, ensure_ascii=False)
        arguments.summary.write_text(text + "\n")
    sentences = broken(binding, jetrt)
    print(f"\n{len(sentences)} promises broken" if sentences else "\nevery promise holds")
    print("\n".join(sentences))
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
