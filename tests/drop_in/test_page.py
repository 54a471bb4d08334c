"""docs/groot.md tells the truth: flags, names, arguments, variables, modes and messages are those of the code."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import jetrt
import jetrt.groot
from jetrt.groot.bundle import OPTIONAL, REQUIRED
from jetrt.groot.installing import WARMUP_CALLS
from jetrt.groot.loop import OptimizedLoop
from jetrt.groot.script import _parser

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "groot.md").read_text(encoding="utf-8")
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for folder, suffix in (("python/jetrt", "py"), ("src", "rs"))
    for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))
)


def table(title: str, columns: int) -> list[list[str]]:
    """The rows of the first table below this heading."""
    below = PAGE[PAGE.index(f"{title}\n") :]
    rows = re.search(r"\n\|[-|]+\|\n((?:\|.*\n)+)", below)
    assert rows is not None
    # `\|` is a bar inside a cell.
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows[1].splitlines()]
    assert {len(row) for row in cells} == {columns}
    return [[cell.strip() for cell in row] for row in cells]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_flags_of_the_runner() -> None:
    told = {cell.split()[0]: cell for (cell,) in (code(row[0]) for row in table("### The runner's flags", 2))}
    real = {action.option_strings[0]: action for action in _parser()._actions if action.option_strings}
    assert set(told) == set(real) - {"-h"}
    for flag, cell in told.items():
        action = real[flag]
        values = "|".join(action.choices) if action.choices else action.metavar
        assert cell.replace("\\", "") == (f"{flag} {values}" if action.nargs != 0 else flag)


def test_warm_up_calls_of_the_runner() -> None:
    assert f"the first {WARMUP_CALLS} calls may stop" in PAGE


def test_flags_in_the_text() -> None:
    real = {flag for action in _parser()._actions for flag in action.option_strings}
    others = {"--python", "--no-sync", "--denoising-steps"}
    prose = re.sub(r"```sh\n.*?```", "", PAGE, flags=re.S)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) <= real | others


def test_environment_variables() -> None:
    told = [name.partition("=")[0] for row in table("## Environment", 2) for name in code(row[0])]
    for name in told:
        assert f'"{name}"' in SOURCES, name
    assert set(re.findall(r"JETRT_[A-Z_]+", PAGE)) <= set(told)


def test_modes_of_a_bundle() -> None:
    told: dict[str, tuple[set[str], set[str]]] = {}
    rows = table("## Bundles: the full pipeline", 3)
    for mode, needed, optional in rows:
        (name,) = code(mode)
        told[name] = plans(needed), plans(optional)
    head = told["action_head"][0]
    told["n17_full_pipeline"] = head, told["n17_full_pipeline"][1]  # "the same"
    told["full_pipeline"] = told["full_pipeline"][0] - {"action_head"} | head, told["full_pipeline"][1]
    real = {
        mode: tuple(
            {name.removesuffix(".engine") for names in by.get(mode, {}).values() for name in names}
            for by in (REQUIRED, OPTIONAL)
        )
        for mode in REQUIRED
    }
    assert told == real


def plans(cell: str) -> set[str]:
    return {name.removesuffix(".engine") for name in code(cell)} - {""}


MESSAGES = {
    "Failed to load TensorRT engine from": "python/jetrt/groot/wrappers.py",
    "TensorRT inference failed": "python/jetrt/groot/wrappers.py",
    "Invalid input shape": "python/jetrt/trt_torch.py",
    "these engines do not fit": "python/jetrt/fit.py",
    "real-time chunking: found the previous actions": "python/jetrt/groot/repair.py",
    "TensorRT only returns the final output": "python/jetrt/groot/replace.py",
    "runs instead of a graph": "python/jetrt/groot/loop.py",
}


def test_errors() -> None:
    rows = table("## Errors, and what to do", 3)
    told = " ".join(row[0] for row in rows)
    for message, file in MESSAGES.items():
        assert message in told, message
        assert message in (ROOT / file).read_text(encoding="utf-8"), message
    known = {
        name
        for module in ("errors", "groot.bundle", "torch_memory")
        for name in vars(importlib.import_module(f"jetrt.{module}"))
    }
    for name in re.findall(r"`(\w+Error)\b", PAGE):
        assert name in known or hasattr(__builtins__, name) or name in dir(__import__("builtins")), name


def test_names_exist() -> None:
    for dotted in re.findall(r"`?(jetrt(?:\.[a-z_]\w*)+)", re.sub(r"jetrt-0\S+", "", PAGE), re.I):
        found: Any = jetrt
        parts = dotted.split(".")[1:]
        for k, part in enumerate(parts):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(".".join(["jetrt", *parts[: k + 1]]))
    for name in ("prepare", "stats", "undo"):
        assert f"handle.{name}" in PAGE
        assert hasattr(OptimizedLoop, name)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.S))
def test_arguments_exist(block: str) -> None:
    """Keywords of the calls in the examples are parameters of what is called."""
    tree = ast.parse(inspect.cleandoc(block))
    known = {"replace_dit_with_tensorrt": jetrt.groot.replace_dit_with_tensorrt}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name.startswith("jetrt."):
            function: Any = jetrt
            for part in name.split(".")[1:]:
                function = getattr(function, part)
        elif name in known:
            function = known[name]
        else:
            continue
        inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})


def test_arguments_in_the_text() -> None:
    loop = inspect.signature(jetrt.groot.optimize).parameters
    for name in ("denoising_steps", "outputs", "max_shapes", "warmup_calls"):
        assert f"`{name}" in PAGE or f"{name}=" in PAGE
        assert name in loop
    assert f"`max_shapes` ({loop['max_shapes'].default})" in PAGE
    for wrapper in (jetrt.groot.TensorRTDiTWrapper, jetrt.groot.TensorRTBackboneWrapper):
        assert {"cache_outputs", "ring"} <= set(inspect.signature(wrapper).parameters)
    assert "free_torch" in inspect.signature(jetrt.groot.replace_dit_with_tensorrt).parameters
    assert {"memory_fraction", "expandable_segments"} <= set(inspect.signature(jetrt.configure_torch_memory).parameters)


def test_links_and_files() -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGE):
        file, _, anchor = target.partition("#")
        path = ROOT / "docs" / file if file else ROOT / "docs" / "groot.md"
        assert path.exists(), target
        if not anchor:
            continue
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
    for path in re.findall(r"`(?:python )?((?:benches|docs|python|src|tests)/[\w./-]+)", PAGE):
        assert (ROOT / path).exists(), path
