"""The README tells the truth: its Python runs, and what needs a GPU at least names what exists."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import fakes
import jetrt
from jetrt.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    line: int
    needs_gpu: bool
    code: str


BLOCKS = [
    Block(README[: match.start(2)].count("\n") + 1, bool(match.group(1)), match.group(2))
    for match in re.finditer(r"(<!-- needs a GPU -->\n)?```python\n(.*?)```", README, re.S)
]


def identified(block: Block) -> str:
    return f"line{block.line}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder holds the model that the README speaks of: y = x + x, float32 [N,64]."""
    import onnx_models  # skips where there is no onnxruntime

    f32 = onnx_models.F32
    onnx_models.save(
        tmp_path / "model.onnx",
        [("Add", ["x", "x"], ["y"], {})],
        [("x", f32, ["N", 64])],
        [("y", f32, ["N", 64])],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_kinds_are_there():
    assert len([block for block in BLOCKS if block.needs_gpu]) >= 1
    assert len([block for block in BLOCKS if not block.needs_gpu]) >= 3


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.needs_gpu], ids=identified)
def test_python_runs(block, folder, capsys):
    exec(compile(block.code, f"README.md:{block.line}", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    # What a comment after print(…) shows is what is printed.
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", block.code, re.M)
    for line in promised:
        assert line in printed


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs_gpu], ids=identified)
def test_python_names_what_exists(block):
    options = set(inspect.signature(jetrt.Engine).parameters)
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = {"jetrt": jetrt, "engine": jetrt.Engine}.get(node.value.id)
            assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "jetrt.Engine":
            assert {keyword.arg for keyword in node.keywords} <= options


def test_options_in_the_tables_exist():
    options = set(inspect.signature(jetrt.Engine).parameters)
    section = README[README.index("## What a call does") : README.index("## Installing")]
    named = set(re.findall(r"`(\w+)=", section)) - {"out"}  # an argument of the call
    assert named
    assert named <= options


COMMANDS = re.findall(r"^jetrt (.*)$", "".join(re.findall(r"```sh\n(.*?)```", README, re.S)), re.M)


def test_commands_are_shown():
    assert [line.split()[0] for line in COMMANDS] == ["run", "run", "--version", "bench", "env", "doctor", "plan"]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines(folder, capfd, line):
    """On the stand-ins for CUDA and TensorRT."""
    fakes.write_plan(folder / "model.engine", "mlp")
    np.save(folder / "x.npy", np.ones((8, 64), np.float32))
    arguments = shlex.split(line)
    if arguments[0] == "bench":
        arguments += ["--iterations", "30", "--duration", "0", "--warmup-limit", "0.3", "--no-picture"]
    code = main(arguments)
    assert code in ((0, 1) if arguments[0] == "doctor" else (0,))  # this machine may have its faults
    assert capfd.readouterr().out


def test_make_targets_exist():
    targets = set(re.findall(r"\bmake ([a-z0-9-]+)", README)) - {"and"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test", "wheel", "wheel-aarch64"} <= targets
    for target in targets:
        assert re.search(rf"^([\w-]+ )*{re.escape(target)}( [\w-]+)*:", makefile, re.M), target


def test_files_that_it_names_exist():
    for path in ("abi", "benches", "examples/text_detection.py"):
        assert (ROOT / path).exists()


def test_every_dependency_has_its_reason():
    reasons = README[README.index("## Built on") :]
    manifest = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    (section,) = re.findall(r"(?ms)^\[dependencies\]\n(.*?)^\[", manifest)
    crates = set(re.findall(r"(?m)^([\w-]+) =", section))
    rows = "".join(re.findall(r"(?m)^\| (.*?) \|", reasons))
    assert crates == set(re.findall(r"`([\w-]+)`", rows)) - {"maturin"}
    named = set(re.findall(r"[\w-]+", " ".join(re.findall(r"(?m)^\| (.*?) \(Python\) \|", reasons)).replace("_", "-")))
    for line in importlib.metadata.requires("jetrt") or []:
        package = re.match(r"[\w-]+", line)[0].replace("_", "-")
        # What tests, the demo and development need is no part of the library.
        assert package in {*named, "jetrt"} or re.search(r"extra == .(test|dev|demo)\b", line), package
