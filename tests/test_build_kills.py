"""`jetrt build` killed at random moments: what has the plan's name afterwards is whole, or refused, or nothing."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fakes
import jetrt
from jetrt.errors import ManifestError, PlanError
from jetrt.provenance import Manifest, Sha256Sidecar, engine_lock

KILLS = 200
FILES = ["m.engine", "m.engine.json", "m.engine.sha256"]
#: The two configurations that take turns, by the workspace that each plan says it was built with.
CONFIGURATIONS = {"fp16": 64 << 20, "bf16": 128 << 20}
SHAPES = {"min": "x:1x64", "opt": "x:8x64", "max": "x:64x64"}
X = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)

# What `jetrt build` does, again and again, in a process that is forked from one that has imported everything, so that
# the kills hit builds and not the start of an interpreter.
FOREVER = """
import itertools, os, sys
import jetrt.builder, jetrt.builder.pipeline
from jetrt.cli import main

def builds(first):
    os.setpgid(0, 0)
    for precision in itertools.cycle(["fp16", "bf16"] if first == "fp16" else ["bf16", "fp16"]):
        arguments = ["build", "--onnx", "m.onnx", "--engine", "m.engine", "--precision", precision, "--overwrite",
                     "--workspace", {"fp16": "64M", "bf16": "128M"}[precision], "--no-parity", "--no-audit",
                     "--min", "x:1x64", "--opt", "x:8x64", "--max", "x:64x64", "--progress", "none"]
        if main(arguments):
            os._exit(1)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        builds(line.strip())
    try:
        os.setpgid(pid, pid)  # here too: whoever is told of it may kill the group at once
    except OSError:
        pass
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Builder:
    """Starts processes that build for ever, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FOREVER],
            cwd=folder,
            env=fakes.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.process.kill()
        self.process.communicate(timeout=30)

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(next(line for line in self.process.stdout if line.strip().lstrip("-").isdecimal()))

    def killed(self, first: str, seconds: float, *, child_too: bool) -> None:
        """The builder dies with its group, and its child (a session of its own) at that moment or of its death."""
        pid = self._ask(first)
        time.sleep(seconds)
        children = descendants(pid)
        os.killpg(pid, signal.SIGKILL)
        for child in children if child_too else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        assert self._ask("") == -signal.SIGKILL


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in path.read_text().split()]
        except OSError:
            continue
    return found


def state(final: Path) -> str:
    """What somebody who loads it meets. Asserts that it is never a mixture, and that no half file has the name."""
    if not final.exists():
        return "absent"
    plan = final.read_bytes()
    content = fakes.plan_content(plan)  # JSON to its end, so that no half of it reads
    (built,) = [name for name, size in CONFIGURATIONS.items() if content["built"]["pools"]["WORKSPACE"] == size]
    assert built.upper() in content["built"]["flags"]
    try:
        engine = jetrt.Engine(final)
    except PlanError as error:  # the manifest's, or the checksum's
        refused = str(error)
        if 'verify="off" loads it anyway' in refused and re.search("not the manifest of this|its SHA-256 is", refused):
            return "refused"
        raise
    manifest = Manifest.read(final)
    assert manifest is not None, "a plan without a manifest was accepted"
    assert manifest.options is not None
    assert manifest.options["precision"] == built, "a plan that was accepted with the manifest of another"
    assert manifest.engine.sha256 == hashlib.sha256(plan).hexdigest()
    with engine:
        found = np.asarray(engine.run({"x": X}, synchronize=True)["y"])
    np.testing.assert_allclose(found, fakes.mlp_reference(X), atol=0.1, rtol=0.05)
    return built


@pytest.mark.timeout(300)
def test_killed_200_times(tmp_path: Path) -> None:
    seed = time.time_ns()
    print("seed", seed)
    generator = random.Random(seed)
    model = fakes.onnx_model(tmp_path / "m.onnx", build={"seconds": 0.02})
    final = tmp_path / "m.engine"
    seen: collections.Counter[str] = collections.Counter()
    killed: collections.Counter[str] = collections.Counter()
    with Builder(tmp_path) as processes:
        for count in range(KILLS):
            if count % 10 == 0:  # from nothing, too
                for path in tmp_path.iterdir():
                    if path != model:
                        path.unlink()
            # A build takes about a third of a second, most of it the start of its children.
            child_too = generator.random() < 0.5
            processes.killed(generator.choice(list(CONFIGURATIONS)), generator.uniform(0, 0.6), child_too=child_too)
            found = state(final)
            seen[found] += 1
            killed["with a lock" if (tmp_path / ".m.engine.lock").exists() else "without"] += 1
            killed["with leftovers"] += any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
            with engine_lock(final, timeout=5):  # free: the kernel took it from the dead
                pass
    print(dict(seen), dict(killed))
    assert seen["absent"] + seen["fp16"] + seen["bf16"] + seen["refused"] == KILLS
    assert min(seen["fp16"], seen["bf16"]) > 0, "no kill came late enough"
    assert killed["with a lock"] > KILLS / 10, "no kill hit a build"
    # The next build makes it right, whatever is there, and removes what the dead left.
    result = jetrt.build(
        model, final, precision="fp16", workspace="64M", overwrite=True, progress="none", parity=False, **SHAPES
    )
    assert state(final) == "fp16"
    assert sorted(path.name for path in tmp_path.iterdir()) == [*FILES, "m.onnx"]
    assert result.manifest == Manifest.read(final)


def test_a_mixture_is_refused(tmp_path: Path) -> None:
    """What a kill between two renames leaves, made by hand: the new companions beside the old plan."""
    model = fakes.onnx_model(tmp_path / "m.onnx")
    final = tmp_path / "m.engine"
    more = {"overwrite": True, "progress": "none", "parity": False, **SHAPES}
    jetrt.build(model, final, precision="fp16", workspace="64M", **more)
    old = {name: (tmp_path / name).read_bytes() for name in FILES}
    jetrt.build(model, final, precision="bf16", workspace="128M", **more)
    new = {name: (tmp_path / name).read_bytes() for name in FILES}
    seen = []
    for choice in range(8):
        for bit, name in enumerate(FILES):
            (tmp_path / name).write_bytes((new if choice >> bit & 1 else old)[name])
        seen.append(state(final))
    assert seen == ["fp16", *["refused"] * 6, "bf16"]


# Two at once ----------------------------------------------------------------------------------------------------------


def command(*more: str) -> list[str]:
    shapes = [word for name, text in SHAPES.items() for word in (f"--{name}", text)]
    return [sys.executable, "-m", "jetrt", "build", "--onnx", "m.onnx", "--engine", "m.engine", *shapes, *more]


def at_once(folder: Path, *commands: list[str]) -> list[tuple[int, str]]:
    running = [
        subprocess.Popen(
            [*one, "--progress", "plain"],
            cwd=folder,
            env=fakes.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for one in commands
    ]
    return [(process.wait(), text) for process in running for text, _ in [process.communicate(timeout=60)]]


def test_the_same_key_is_built_once(tmp_path: Path) -> None:
    fakes.onnx_model(tmp_path / "m.onnx", build={"seconds": 1.5})
    answers = at_once(tmp_path, *[command("--precision", "fp16")] * 3)
    assert [code for code, _ in answers] == [0, 0, 0]
    texts = sorted((text for _, text in answers), key=lambda text: "nothing was built" in text)
    assert "built in 1." in texts[0]
    for text in texts[1:]:
        assert "m.engine is there already and is the same plan" in text
        assert "is building m.engine" in text  # the one that was waited for, by its process
    assert sorted(path.name for path in tmp_path.iterdir()) == [*FILES, "m.onnx"]


def test_two_configurations_of_one_name(tmp_path: Path) -> None:
    fakes.onnx_model(tmp_path / "m.onnx", build={"seconds": 1})
    answers = at_once(tmp_path, command("--precision", "fp16"), command("--precision", "bf16"))
    (won,) = [text for code, text in answers if code == 0]
    (lost,) = [text for code, text in answers if code == 1]
    assert "m.engine: 0.0" in won
    assert "jetrt: EngineBuildError: m.engine is there already and was built from something else:" in lost
    assert "precision" in lost
    assert '"fp16"' in lost
    assert '"bf16"' in lost
    assert "Give another --engine, or replace it with --overwrite (overwrite=True)." in lost
    kept = json.loads((tmp_path / "m.engine.json").read_text())["options"]["precision"]
    assert lost.index(f'"{kept}"') < lost.index('"bf16"' if kept == "fp16" else '"fp16"')  # there, then wanted
    assert Sha256Sidecar.read(tmp_path / "m.engine") == Sha256Sidecar.of(tmp_path / "m.engine")


def test_a_killed_builder_does_not_hold_up_the_next(tmp_path: Path) -> None:
    fakes.onnx_model(tmp_path / "m.onnx", build={"seconds": 600})
    first = subprocess.Popen(
        command("--progress", "none"), cwd=tmp_path, env=fakes.environment(), start_new_session=True
    )
    until = time.monotonic() + 30
    while not list(tmp_path.glob(".m.engine.lock")):
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)
    first.kill()
    first.wait()
    fakes.onnx_model(tmp_path / "m.onnx")
    ((code, text),) = at_once(tmp_path, command())
    assert code == 0, text
    assert sorted(path.name for path in tmp_path.iterdir()) == [*FILES, "m.onnx"]


def test_the_manifest_of_a_refused_one_says_how_to_go_on(tmp_path: Path) -> None:
    model = fakes.onnx_model(tmp_path / "m.onnx")
    final = tmp_path / "m.engine"
    jetrt.build(model, final, progress="none", parity=False, audit=False, **SHAPES)
    (tmp_path / "m.engine.sha256").write_text(f"{'0' * 64}  m.engine\n")
    with pytest.raises(ManifestError) as caught:
        jetrt.Engine(final)
    assert caught.value.command is not None
    assert caught.value.command.startswith(f"jetrt build --onnx {model} --engine {final} --min x:1x64")
