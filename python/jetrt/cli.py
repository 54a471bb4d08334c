"""The command `jetrt`. It exits with 0, with 2 for a command line that makes no sense, with 1 for everything else.

Only the module of the command that is named is imported, so that `jetrt env` does not wait for the builder.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Sequence

from . import _core
from .commands import UsageError
from .errors import BenchOptionError, BuildCrashError, BuildOptionError, JetrtError, RuntimeConfigError

_COMMANDS = {
    "run": "run a model on .npy files",
    "build": "build a plan from an ONNX file, checked and with a manifest",
    "inspect": "show what a plan is, how exact it is, and where its time goes",
    "verify": "compare a plan with its reference again, on this machine",
    "stamp": "give a plan that came without one a manifest, after running it here",
    "bench": "measure models on runtimes: how fast, how exact, how hot",
    "env": "show the versions, libraries and settings of this machine",
    "doctor": "find what is wrong with this machine, with the command that fixes it",
    "plan": "say whether a set of plans fits into the memory of this machine",
}


def version_text() -> str:
    """One line with everything that a bug report needs about this build."""
    import numpy as np

    info = _core.build_info()
    return (
        f"jetrt {info['version']} ({info['profile']} build for {info['target']}, {info['rustc']}, "
        f"{info['python_abi']}; Python {platform.python_version()}, numpy {np.__version__}; "
        f"runs TensorRT {info['tensorrt']})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jetrt", description="Build, run and judge TensorRT plans.")
    parser.add_argument("--version", action="store_true", help="print the version and how it was built")
    commands = parser.add_subparsers(metavar="COMMAND")
    words = sys.argv[1:] if argv is None else list(argv)
    named = next((word for word in words if not word.startswith("-")), None)
    for name, does in _COMMANDS.items():
        described = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        if name == named:
            module = importlib.import_module(f".commands.{name}", __package__)
            getattr(module, f"add_{name}")(described)
    arguments = parser.parse_args(words)
    if arguments.version:
        print(version_text())
        return 0
    if not hasattr(arguments, "function"):
        parser.error("a COMMAND is needed; `jetrt run --help` describes the first one")
    try:
        code = arguments.function(arguments)
    except (UsageError, BuildOptionError, BenchOptionError, RuntimeConfigError) as error:
        return _fail(parser.prog, error, 2)
    except BuildCrashError as error:
        return _fail(parser.prog, error, 130 if error.how == "interrupted" else 1)
    except (JetrtError, OSError) as error:
        return _fail(parser.prog, error, 1)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    return int(code or 0)  # a command may have a code of its own for what it found


def _fail(program: str, error: Exception, code: int) -> int:
    kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    print(f"{program}: {kind}{str(error).rstrip()}", file=sys.stderr)
    return code
