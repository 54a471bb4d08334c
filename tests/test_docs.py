"""docs/ tells the truth: files, options, numbers and tests that it names exist; and traps that no other test shows."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import fakes
import jetrt
from jetrt import errors
from jetrt.builder.options import BuildOptions
from jetrt.builder.preprocessing import Preprocessing
from jetrt.builder.process import _environment
from jetrt.builder.targets import targets
from jetrt.builder.thresholds import Thresholds
from jetrt.commands.bench import add_bench
from jetrt.commands.build import add_build
from jetrt.commands.doctor import add_doctor
from jetrt.commands.env import add_env
from jetrt.commands.inspect import add_inspect
from jetrt.commands.plan import add_plan
from jetrt.commands.run import add_run
from jetrt.commands.stamp import add_stamp
from jetrt.commands.verify import add_verify
from jetrt.known_failures import Entry
from jetrt.provenance import Machine, Manifest

ROOT = Path(__file__).parent.parent
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        *(f"docs/{name}.md" for name in ("building", "groot", "runtimes", "tools", "traps")),
        *("benches/README.md", "tests/onnx_backend/README.md"),
    )
}
BUILDING = PAGES["docs/building.md"]
COMMANDS = {
    "bench": add_bench,
    "build": add_build,
    "doctor": add_doctor,
    "env": add_env,
    "inspect": add_inspect,
    "plan": add_plan,
    "run": add_run,
    "stamp": add_stamp,
    "verify": add_verify,
}


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS[command](parser)
    return parser


def block(mark: str) -> str:
    (found,) = re.findall(rf"<!-- {mark} -->\n```\w+\n(.*?)```", BUILDING, re.S)
    return str(found)


# What the pages say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```$", "", PAGES[page])):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    for path in re.findall(r"`((?:abi|benches|docs|examples|python|src|tests)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    shell = "".join(re.findall(r"(?ms)^```sh$(.*?)^```$", PAGES[page]))
    for line in re.findall(r"^\$ jetrt (.*)$", PAGES[page], re.M) + re.findall(r"^jetrt ([a-z].*)$", shell, re.M):
        command, *words = shlex.split(line, comments=True)
        arguments = parser_of(command).parse_args(words)
        if command == "build":
            (target,) = targets(arguments)  # refuses contradictions
            assert target.onnx is not None


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("building", "runtimes", "tools", "traps"))]
)
def test_options_exist(page: str) -> None:
    known = {flag for command in COMMANDS for action in parser_of(command)._actions for flag in action.option_strings}
    others = {"--version", "--system-site-packages", "--python", "--user", "--no-deps", "--rm", "--runtime"}
    others |= {"--useDLACore"}  # trtexec's
    others |= {"--inference-mode", "--trt-engine-path", "--denoising-steps", "--optimize"}  # GR00T's, and its runner's
    prose = re.sub(r"```sh\n.*?```", "", PAGES[page], flags=re.S)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) <= known | others


def found_at(path: str) -> Any:
    """What `jetrt.thermal.monitor` is."""
    found: Any = jetrt
    for depth, part in enumerate(path.split(".")[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(path.split(".")[:depth]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/runtimes.md", "docs/tools.md"])
def test_python_names_what_exists(page: str) -> None:
    blocks = re.findall(r"(?ms)^```python$(.*?)^```$", PAGES[page])
    assert blocks
    for node in [node for block in blocks for node in ast.walk(ast.parse(block))]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jetrt"):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module or ""), alias.name), alias.name
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jetrt."):
            found_at(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("jetrt."):
            known = inspect.signature(found_at(ast.unparse(node.func))).parameters
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            assert given <= set(known) or any(p.kind is p.VAR_KEYWORD for p in known.values()), ast.unparse(node)


def test_the_example_in_python() -> None:
    tree = ast.parse(block("python"))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "jetrt.build"]
    names = {keyword.arg for keyword in call.keywords if keyword.arg} | {"min", "opt", "max"}
    assert names <= {entry.name for entry in fields(BuildOptions)}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "result"}
    assert used <= {entry.name for entry in fields(jetrt.builder.pipeline.BuildResult)}


def test_thresholds() -> None:
    rows = re.search(r"<!-- thresholds -->\n.*?\n\|[-|]+\n(.*?)\n\n", BUILDING, re.S)
    assert rows is not None
    told = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]
    for precision, cosine, relative, absolute in told:
        limits = Thresholds.of(precision).default
        assert (limits.cosine, limits.max_rel, limits.absolute) == (float(cosine), float(relative), float(absolute))
        assert (limits.max_abs, limits.mean_abs, limits.to_peak, limits.differing) == (None, None, None, 0)
    assert {row[0] for row in told} == {"fp32", "tf32", "fp16", "bf16", "int8", "fp8", "mixed"}


def test_sections_of_the_manifest() -> None:
    table = BUILDING[BUILDING.index("The **manifest**") : BUILDING.index("<!-- manifest -->")]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (.*?) \|", table)))
    assert sorted(named) == sorted(entry.name for entry in fields(Manifest))
    shown = json.loads(block("manifest"))
    assert set(shown) <= set(named)
    assert set(shown["machine"]) == {entry.name for entry in fields(Machine)}


def test_an_entry_of_the_known_failures() -> None:
    entry = Entry(**json.loads(block("known failure")))
    assert entry.kind in ("failure", "accuracy", "note")


def test_the_preprocessing_line() -> None:
    (text,) = re.findall(r"--calib-preprocess (\S+=\S+)", BUILDING)
    assert Preprocessing.parse(text).text() == Preprocessing.parse(Preprocessing.SYNTAX).text()


def test_results_of_the_onnx_suite() -> None:
    """The table is what the file with the results says."""
    found = json.loads((ROOT / "benches/results/onnx_backend.json").read_text(encoding="utf-8"))
    page = PAGES["tests/onnx_backend/README.md"]
    for who, name in (("jetrt", "jetrt"), ("NVIDIA's binding", "binding")):
        counts = found[name]["counts"]
        columns = [counts.get(key, 0) for key in ("pass", "wrong", "parser", "builder", "type", "shape", "crash")]
        columns += [round(found[name]["seconds"]), found[name]["versions"]["workers"]]
        assert f"| {who} | {' | '.join(map(str, columns))} |" in page
    refused = [case for case in found["wrong"].values() if case["gate"].startswith("ParityError: ")]
    assert f"refuses {len(refused)}." in page
    assert f"TensorRT gives these {len(found['wrong'])} without any error" in page
    assert found["cases"] == sum(found["jetrt"]["counts"].values())
    assert f"reports {('no', 'one', 'two', 'three')[len(found['broken promises'])]} promises as broken" in page


@pytest.mark.parametrize(("name", "key"), [("build_dit", "dit_2_layers"), ("build_auto", "auto_conv")])
def test_transcripts_are_those_of_the_results(name: str, key: str) -> None:
    found = json.loads((ROOT / f"benches/results/{name}.json").read_text(encoding="utf-8"))[key]
    printed = {line.rstrip() for line in f"{found['messages']}\n{found['output']}".split("\n")}
    (shown,) = [
        t for t in re.findall(r"```console\n(.*?)```", BUILDING, re.S) if t.startswith(f"$ {found['command']}\n")
    ]
    lines = [line.rstrip() for line in shown.splitlines()[1:]]
    assert [line for line in lines if line not in printed and line != "[…]"] == []
    assert len(lines) > 10


@pytest.mark.parametrize(
    ("name", "command"), [("inspect_rec", "inspect rec.engine --layers 6"), ("verify_rec", "verify rec.engine")]
)
def test_what_the_commands_printed(name: str, command: str) -> None:
    printed = {line.rstrip() for line in (ROOT / f"benches/results/{name}.txt").read_text(encoding="utf-8").split("\n")}
    (shown,) = [t for t in re.findall(r"```console\n(.*?)```", BUILDING, re.S) if t.startswith(f"$ jetrt {command}\n")]
    lines = shown.splitlines()[1:]
    assert [line for line in lines if line not in printed and line != "[…]"] == []
    assert len(lines) > 10


# Traps ----------------------------------------------------------------------------------------------------------------


def names_in(path: Path) -> set[str]:
    if path.suffix == ".rs":
        return set(re.findall(r"fn (\w+)\(", path.read_text(encoding="utf-8")))
    return {n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}


def rows() -> Iterator[list[str]]:
    for line in PAGES["docs/traps.md"].splitlines():
        if line.startswith("| ") and not line.startswith("| trap"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def named_in(text: str) -> list[str]:
    """The tests that a text names, all of which exist."""
    found = []
    for file, test in re.findall(r"`([\w/.]+)::(\w+)`", text):
        path = ROOT / file if file.endswith(".rs") else ROOT / "tests" / file
        assert test in names_in(path), f"{file}::{test}"
        found.append(test)
    return found


def test_every_trap_has_a_test_or_a_reason() -> None:
    count = 0
    for trap, what, shown in rows():
        count += 1
        assert trap
        assert what
        assert named_in(shown) or shown.startswith("none: "), trap
    assert count > 60


def test_every_promise_of_the_drop_in_has_a_test() -> None:
    page = PAGES["docs/groot.md"]
    table = re.findall(r"(?m)^\| (.*) \| (.*)\|$", page[page.index("## Which test shows it") :])
    promises = [row for row, shown in table if named_in(shown)]
    assert [row for row, _ in table if row not in promises] == [
        *("**Promises**", "**Seam A**", "**Seam B**", "**Seam C**", "**Forks**", "**Not inherited**")
    ]
    assert [int(row.partition(".")[0]) for row in promises if row[0].isdigit() and ". " in row] == list(range(1, 15))


@pytest.mark.parametrize("version", ["10.0.0.6", "10.3.0.26", "10.8.0.43", "10.16.0.1", "11.1.0.2"])
def test_building_on_other_versions(tmp_path: Path, version: str) -> None:
    code = """
import fakes, sys, jetrt
from pathlib import Path
folder = Path(sys.argv[1])
shapes = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
result = jetrt.build(fakes.onnx_model(folder / "m.onnx"), folder / "m.engine", progress="none", **shapes)
print(result.manifest.machine.tensorrt, result.manifest.parity.state, jetrt.Engine(result.path).tensorrt_version)
"""
    pytest.importorskip("onnxruntime")
    assert fakes.run_python(code, str(tmp_path), version=version).stdout.split() == [version, "passed", version]


def test_the_child_finds_the_builders_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    """libnvinfer loads them by name and has no RUNPATH: its folder comes first."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/other:/opt/trt:/more")
    found = _environment("/opt/trt/libnvinfer.so.10", {"CUDA_MODULE_LOADING": "LAZY"})
    assert found["LD_LIBRARY_PATH"] == "/opt/trt:/other:/more"
    assert found["JETRT_TENSORRT_PATH"] == "/opt/trt/libnvinfer.so.10"
    assert found["CUDA_MODULE_LOADING"] == "LAZY"


def test_the_parser_is_of_libnvinfers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one on the loader's path is not taken."""
    for name in ("libnvinfer.so.10", "libnvinfer_plugin.so.10"):
        shutil.copy(fakes.library_dir() / name, tmp_path / name)
    monkeypatch.setenv("JETRT_TENSORRT_PATH", str(tmp_path))
    model = fakes.onnx_model(tmp_path / "m.onnx")
    with pytest.raises(errors.LibraryNotFoundError, match=r"libnvonnxparser\.so\.10 is not in .*, where libnvinfer is"):
        jetrt.build(model, tmp_path / "m.engine", min="x:1x64", opt="x:8x64", max="x:64x64", progress="none")
    assert not (tmp_path / "m.engine").exists()


def test_a_timing_cache_of_another_tensorrt(tmp_path: Path) -> None:
    """It is told and not used, and what was measured here is kept in its place."""
    model, cache = fakes.onnx_model(tmp_path / "m.onnx"), tmp_path / "timing.cache"
    shapes = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}

    def build() -> Any:
        more = {"timing_cache": str(cache), "rebuild": True, "parity": False, "audit": False}
        return jetrt.build(model, tmp_path / "m.engine", progress="none", **shapes, **more)

    def hits() -> int:
        return int(fakes.plan_content(tmp_path / "m.engine")["built"]["timing_cache"]["hits"])

    build()
    result = build()
    assert (hits() > 0, result.notes) == (True, ())
    assert result.manifest.timing_cache == {"sha256": hashlib.sha256(cache.read_bytes()).hexdigest()}
    cache.write_bytes(cache.read_bytes().replace(b"10.6.0.26", b"10.5.0.18"))
    told = f"{cache} is of another TensorRT, GPU or configuration and was not used"
    assert (build().notes, hits()) == ((told,), 0)
    assert (build().notes, hits() > 0) == ((), True)
