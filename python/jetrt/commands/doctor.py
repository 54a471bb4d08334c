"""`jetrt doctor`: what is wrong with this machine, why it matters, and the command that fixes it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import UsageError

__all__ = ["add_doctor"]

_CODES = "exit code: 0 nothing wrong (notes at most), 1 errors or warnings were found, 2 a senseless command line"


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_doctor)
    parser.epilog = _CODES
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), metavar="FOLDER", help="plans and scripts to look at (.)"
    )
    parser.add_argument("--deep", action="store_true", help="import heavy packages and ask CUDA, in other processes")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="ID", help="a finding that is not wanted; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE.tar.gz",
        help="write what a bug report to NVIDIA needs, without secrets (as --deep)",
    )
    parser.add_argument(
        "--include", action="append", default=[], type=Path, metavar="FILE", help="a log or model for the bundle"
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from .. import doctor

    if arguments.include and not arguments.bundle:
        raise UsageError("--include puts files into a bundle: give --bundle FILE.tar.gz too")
    if arguments.bundle and not arguments.bundle.name.endswith((".tar.gz", ".tgz")):
        raise UsageError(f"--bundle {arguments.bundle}: the name must end in .tar.gz")
    if not arguments.folder.is_dir():
        raise UsageError(f"{arguments.folder} is not a folder: give the one that has your plans and scripts")
    facts = doctor.gather(arguments.folder, deep=arguments.deep or bool(arguments.bundle))
    report = doctor.check(facts, arguments.ignore)
    print(json.dumps(report.to_mapping(), indent=1) if arguments.json else report.text())
    if arguments.bundle:
        sys.stdout.flush()
        from ..doctor.bundle import write_bundle

        names = write_bundle(arguments.bundle, facts, report, include=arguments.include)
        told = f"{arguments.bundle}: {len(names)} files. Look through them before you send it: {', '.join(names)}"
        print(told, file=sys.stderr if arguments.json else sys.stdout)
    return report.code
