"""`jetrt env`: versions, libraries and settings of this machine, without importing anything heavy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import environment

__all__ = ["add_env", "write_text"]


def add_env(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_env)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it to a file as well")


def _env(arguments: argparse.Namespace) -> None:
    found = environment.read()
    text = json.dumps(found.to_mapping(), indent=1) if arguments.json else environment.text(found)
    print(text)
    if arguments.output:
        write_text(arguments.output, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a report; its folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
