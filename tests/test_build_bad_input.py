"""What a build is given wrongly: models, hints, folders, disks, manifests. Each ends in a sentence that says what to
do, and leaves nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fakes
import jetrt
from jetrt.cli import main
from jetrt.errors import BuildOptionError, EngineBuildError, JetrtError, ManifestError, ModelError, ParityError

SHAPES = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
WORDS = [word for name, text in SHAPES.items() for word in (f"--{name}", text)]
MODEL = fakes.onnx_bytes()

Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def one(content: bytes | None = MODEL, engine: str | Path = "m.engine", **more: Any) -> Any:
        if content is not None:
            (tmp_path / "m.onnx").write_bytes(content)
        quick = {"parity": False, "audit": False, "progress": "none", **SHAPES, **more}
        return jetrt.build(
            tmp_path / "m.onnx", tmp_path / engine, **{name: value for name, value in quick.items() if value is not ...}
        )

    return one


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"m\.onnx: there is no such file\."),
        (b"", r"m\.onnx: the file is empty\."),
        (b"garbage" * 10, r"m\.onnx: it is not an ONNX model, or damaged: field 12 has the unknown wire type 7\."),
        (
            MODEL[:-100],
            r"m\.onnx: it is truncated: field 7 needs [\d,]+ bytes and the file has [\d,]+\. Copy or download it again",
        ),
        (fakes.plan_bytes(), r"m\.onnx: it is not an ONNX model, or damaged"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, build: Build, content: bytes | None, text: str) -> None:
    with pytest.raises(ModelError, match=text) as caught:
        build(content)
    assert caught.value.path == str(tmp_path / "m.onnx")
    assert left(tmp_path) == ([] if content is None else ["m.onnx"])


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it cannot be read: Is a directory\."):
        jetrt.build(tmp_path)


def test_external_data(tmp_path: Path, build: Build) -> None:
    content = fakes.onnx_bytes(external="w.bin", folder=tmp_path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError) as caught:
        build(content)
    assert caught.value.message == (
        f"{tmp_path}/m.onnx: its weights lie in 'w.bin', and {tmp_path}/w.bin cannot be read (No such file or "
        "directory). Put that file beside the model, under this name."
    )
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"its weights need 2,600 bytes of 'w\.bin', which has 5\. Copy or download"):
        build(content)
    with pytest.raises(ModelError) as caught:
        build(fakes.onnx_bytes(external="../../etc/passwd"))
    assert caught.value.message == (
        f"{tmp_path}/m.onnx: the weight 'w' lies in '../../etc/passwd'; external data must be a file in the model's "
        "own folder."
    )


def test_an_unsupported_operator(tmp_path: Path, build: Build) -> None:
    nodes = [fakes.node("Nope", ["x"], ["h"]), fakes.node("Never", ["h"], ["y"], name="")]
    with pytest.raises(ModelError) as caught:
        build(fakes.onnx_bytes("copy", nodes=nodes), min="x:1x4", opt="x:1x4", max="x:1x4")
    error = caught.value
    assert error.message.startswith(
        f"{tmp_path}/m.onnx: TensorRT's ONNX parser refused it (2 problems):\n"
        "  node 0 '/h' (Nope): INVALID_NODE: creator && \"Plugin not found"
    )
    assert (
        "Export it again with other operators or another opset, give a plugin library with --plugins, or build it with "
        "a newer TensorRT.\n"
    ) in error.message
    assert "Known failure 'operator-or-plugin-unknown'" in error.message
    assert error.problems is not None
    assert [(one["node"], one["operator"]) for one in error.problems] == [(0, "Nope"), (1, "Never")]
    assert error.problems[0]["name"] == "/h"
    assert all(one["reason"].startswith('creator && "Plugin not found') for one in error.problems)
    assert left(tmp_path) == ["m.onnx"]


def test_an_opset_that_is_too_new(tmp_path: Path, build: Build) -> None:
    """TensorRT's parser takes any; then nothing can say whether the plan is right, and the build says so."""
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    content = fakes.onnx_bytes(opset=99)
    result = build(content, parity=True)
    assert result.manifest.parity.state == "not run"
    (note,) = [note for note in result.notes if "parity was NOT checked" in note]
    assert "Opset 99 is under development" in note
    assert "Give --reference out.npz with outputs from elsewhere." in note
    with pytest.raises(ParityError, match=r"Parity was not checked: onnxruntime .* Opset 99 is under development"):
        build(content, "strict.engine", parity=True, strict=True)
    assert left(tmp_path) == ["m.engine", "m.engine.json", "m.engine.sha256", "m.onnx"]


# Any change may leave a model that builds; what must not be is another exception, a crash of this process, or rests.
def test_hostile_models(tmp_path: Path, build: Build) -> None:
    generator = random.Random(20)
    refused = []
    for _ in range(25):
        data = bytearray(MODEL)
        for _ in range(generator.choice([1, 4, 40])):
            # Weights are most of the file; what describes them comes first and last.
            place = generator.choice([generator.randrange(150), generator.randrange(len(data) - 200, len(data))])
            data[place] = generator.randrange(256)
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        try:
            build(bytes(data), overwrite=True)
        except JetrtError as error:
            refused.append(str(error))
        assert not [name for name in left(tmp_path) if name.startswith(".")]
    assert len(refused) > 5
    assert all(refused)


# Hints ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hints", "text"),
    [
        (
            {"min": ..., "opt": ..., "max": ...},
            "the input 'x' is [batch, 64], and nothing says how large batch can be. Give --min x:1x64 --opt x:1x64 "
            "--max x:1x64.",
        ),
        (
            {"min": "x:9x64"},
            "--min x:9x64 and --opt x:8x64: 'x', axis 0 is 9 in min and 8 in opt; min <= opt <= max must hold.",
        ),
        (
            {"min": "batch=1", "opt": "batch=4", "max": "x:2x64"},
            "input 'x', axis 0 (batch): opt is 4 (--opt batch=4), above max 2 (--max x:2x64); min <= opt <= max must "
            "hold.",
        ),
        ({"min": "z:1x64"}, "--min names 'z'; the model's inputs are 'x'."),
    ],
)
def test_hints(tmp_path: Path, build: Build, hints: dict[str, Any], text: str) -> None:
    with pytest.raises(BuildOptionError) as caught:
        build(**hints)
    assert caught.value.message == text
    assert left(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("hint", ["x:1x63", "x:1x64x1", "x:-1x64", "x:axb", "nothing=3", "x:"])
def test_hints_that_do_not_fit_the_model(tmp_path: Path, build: Build, hint: str) -> None:
    with pytest.raises(BuildOptionError, match=re.escape(hint.partition(":")[0].partition("=")[0])):
        build(min=hint, opt=hint, max=hint)
    assert left(tmp_path) == ["m.onnx"]


def test_the_flags_that_are_printed_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fakes.onnx_model("m.onnx", "add")
    command = ["build", "--onnx", "m.onnx", "--engine", "m.engine", "--progress", "none"]
    assert main(command) == 2
    (flags,) = re.findall(r"Give (--min .*) with a number for each \?\.$", capsys.readouterr().err, re.M)
    assert flags == "--min 'a:?x8,b:?x8' --opt 'a:?x8,b:?x8' --max 'a:?x8,b:?x8'"
    assert main([*command, *shlex.split(flags.replace("?", "2"))]) == 0


# Folders and disks ----------------------------------------------------------------------------------------------------


def test_folders_that_take_no_plan(tmp_path: Path, build: Build) -> None:
    with pytest.raises(EngineBuildError) as caught:
        build(engine="no/m.engine")
    assert caught.value.message == (
        f"{tmp_path}/no/.m.engine.lock: the folder {tmp_path}/no does not exist. Create it, or give another one."
    )
    with pytest.raises(EngineBuildError, match=r"m\.onnx/\.m\.engine\.lock: cannot be written: Not a directory\."):
        build(engine="m.onnx/m.engine")
    with pytest.raises(BuildOptionError, match=r"the name has 300 bytes and may have \d+\. Give another --engine\."):
        build(engine="x" * 300)
    (tmp_path / "folder").mkdir()
    with pytest.raises(EngineBuildError, match=r"folder is there already and is no file: nothing is put in its place"):
        build(engine="folder")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EngineBuildError, match=r"Give another --engine, or replace it with --overwrite"):
        build(engine="notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(EngineBuildError, match=r"the folder .*/gone does not exist\."):
        build(timing_cache=str(tmp_path / "gone" / "t.cache"))
    assert left(tmp_path) == ["folder", "m.onnx", "notes.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; test_publishing.py has a read-only disk")
def test_a_read_only_folder(tmp_path: Path, build: Build) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(EngineBuildError, match=r"locked cannot be written \(Permission denied\)\. Change its rights"):
        build(engine="locked/m.engine")


def test_a_file_system_that_turns_read_only(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def refused(self: Path, target: Any) -> Any:
        if str(target).endswith(".engine"):
            raise OSError(30, "Read-only file system")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(EngineBuildError, match=r"cannot be written \(Read-only file system\)\. Change its rights"):
        build()
    assert "m.engine" not in left(tmp_path)


LIMITED = """
import resource, signal, sys, jetrt
from pathlib import Path
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
more = {"timing_cache": str(folder / "t.cache")} if len(sys.argv) > 3 else {}
try:
    jetrt.build(folder / "m.onnx", folder / "m.engine", min="x:1x64", opt="x:8x64", max="x:64x64", progress="none",
                parity=False, audit=False, **more)
    print("built")
except jetrt.JetrtError as error:
    print(type(error).__name__, error)
print(sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.parametrize("limit", [200, 3000])
def test_a_disk_without_room(tmp_path: Path, limit: int) -> None:
    """The plan, in the child; that of the manifest is in test_publishing.py."""
    fakes.onnx_model(tmp_path / "m.onnx")
    message, names = fakes.run_python(LIMITED, str(tmp_path), str(limit)).stdout.splitlines()
    assert re.fullmatch(
        rf"EngineBuildError {re.escape(str(tmp_path))}/\.m\.engine\.\d+\.tmp: larger than a file may be here: see "
        r"`ulimit -f` and the file system's own limit\.",
        message,
    )
    assert names == "['m.onnx']"


def test_room_for_all(tmp_path: Path) -> None:
    fakes.onnx_model(tmp_path / "m.onnx")
    assert fakes.run_python(LIMITED, str(tmp_path), str(1 << 20)).stdout.startswith("built\n")


# Manifests ------------------------------------------------------------------------------------------------------------


def hostile(text: str) -> dict[str, bytes]:
    manifest = json.loads(text)

    def with_(**fields: Any) -> bytes:
        return json.dumps({**manifest, **fields}).encode()

    engine, machine = manifest["engine"], manifest["machine"]
    return {
        "empty": b"",
        "no JSON": b"{",
        "not a mapping": b"[]",
        "too deep": b"[" * 100_000,
        "no text": b"\xff\xfe\x00",
        "another schema": with_(schema="jetrt-manifest-9"),
        "no engine": with_(engine=None),
        "a path as its name": with_(engine={**engine, "file": "../../etc/passwd"}),
        "a number as digest": with_(engine={**engine, "sha256": 5}),
        "bytes below zero": with_(engine={**engine, "bytes": -1}),
        "sm as text": with_(machine={**machine, "sm": "ninety"}),
        "a key that is none": with_(key="x"),
        "nan": text.replace('"seconds": ', '"seconds": NaN, "was": ', 1).encode(),
        "twice the same": text.replace("{", '{"key": "a",', 1).encode(),
    }


@pytest.mark.parametrize("what", hostile('{"engine": {}, "machine": {}}'))
def test_hostile_manifests(tmp_path: Path, build: Build, what: str) -> None:
    result = build()
    path = tmp_path / "m.engine.json"
    path.write_bytes(hostile(path.read_text())[what])
    with pytest.raises(ManifestError) as caught:
        jetrt.Engine(result.path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "or build the plan again" in caught.value.message
    assert len(caught.value.message) < 1000
    assert jetrt.Engine(result.path, verify="off").load_report["warnings"] == [caught.value.message]
    # A build neither trusts nor replaces it unasked.
    with pytest.raises(EngineBuildError, match=r"m\.engine is there already and has a manifest that cannot be used"):
        build()
    assert build(overwrite=True).built
    assert jetrt.Engine(result.path).load_report["warnings"] == []


def test_from_a_hostile_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fakes.onnx_model("m.onnx")
    command = ["build", "--onnx", "m.onnx", "--engine", "m.engine", "--progress", "none", "--from-manifest", "x.json"]
    for text, said in {
        "{": "--from-manifest x.json is not JSON: ",
        "[]": "--from-manifest x.json has no build options",
        '{"options": {"precission": "fp16"}}': "--from-manifest x.json: there is no option 'precission'.",
        '{"options": {"precision": ["fp16"]}}': "--precision is ['fp16']; allowed: ",
        '{"options": {"workspace": {"a": 1}}}': "--workspace is {'a': 1}; allowed: ",
    }.items():
        Path("x.json").write_text(text)
        assert main(command) == 2
        assert f"jetrt: BuildOptionError: {said}" in capsys.readouterr().err
    Path("x.json").unlink()
    assert main(command) == 2
    assert "--from-manifest x.json: No such file or directory." in capsys.readouterr().err
