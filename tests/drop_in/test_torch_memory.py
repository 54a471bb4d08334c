"""`configure_torch_memory`: what is set where, what is too late, what was there before, and the probe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jetrt import torch_memory
from jetrt.platform import Platform
from jetrt.torch_memory import EFFECTS, VARIABLES, TorchMemoryError, configure_torch_memory


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch_memory._expandable_segments_work.cache_clear()
    # Other tests of this process have initialised CUDA.
    monkeypatch.setattr(torch_memory, "_initialized", lambda: False)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[int]]:
    """`probed(True)`: expandable segments work; the list gets the devices that were asked about."""

    def answer(works: bool) -> list[int]:
        asked: list[int] = []

        def probe(device: int) -> tuple[bool, str]:
            asked.append(device)
            return works, "on: it was tried" if works else "off: it failed"

        monkeypatch.setattr(torch_memory, "_expandable_segments_work", probe)
        return asked

    return answer


def run(code: str, **env: Any) -> Any:
    """The code's `found` as JSON, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json\n{code}\nprint(json.dumps(found))"],
        env={**os.environ, **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What is set ----------------------------------------------------------------------------------------------------------


def test_nothing_asked_for_and_nothing_that_works(probed: Any) -> None:
    probed(False)
    found = configure_torch_memory()
    assert (found.settings, found.environment, found.memory_fraction) == ({}, {}, None)
    assert not set(VARIABLES) & set(os.environ)
    assert found.reasons == {"expandable_segments": "off: it failed"}


def test_both_variables_carry_all_settings(probed: Any) -> None:
    """Every torch reads the older name; which one wins where both are set depends on the version."""
    asked = probed(True)
    found = configure_torch_memory(garbage_collection_threshold=0.6, max_split_size_mb=128, device=1)
    text = "garbage_collection_threshold:0.6,max_split_size_mb:128,expandable_segments:True"
    assert {name: os.environ[name] for name in VARIABLES} == found.environment == dict.fromkeys(VARIABLES, text)
    assert asked == [1]
    assert found.reasons["expandable_segments"] == "on: it was tried"


@pytest.mark.parametrize(("value", "written"), [(True, "True"), (False, "False")])
def test_expandable_segments_as_asked_for(probed: Any, value: bool, written: str) -> None:
    asked = probed(True)
    assert configure_torch_memory(value).settings == {"expandable_segments": written}
    assert asked == []
    assert configure_torch_memory(None).reasons == {"expandable_segments": "in the environment before"}


def test_what_was_there_before_is_kept_unless_it_is_named(probed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = probed(True)
    before = "backend:native,roundup_power2_divisions:[256:1,512:2,>:4],expandable_segments:False"
    monkeypatch.setenv(VARIABLES[0], before)
    found = configure_torch_memory(garbage_collection_threshold=0.5)
    assert os.environ[VARIABLES[0]] == before + ",garbage_collection_threshold:0.5"
    assert asked == []  # the environment has decided
    assert found.settings["roundup_power2_divisions"] == "[256:1,512:2,>:4]"
    assert found.reasons["expandable_segments"] == "in the environment before"
    again = configure_torch_memory(True, garbage_collection_threshold=0.7)
    assert again.settings["expandable_segments"] == "True"
    assert again.reasons["expandable_segments"] == "asked for, in place of False"
    assert "garbage_collection_threshold:0.7" in os.environ[VARIABLES[1]]


def test_the_newer_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[1], "expandable_segments:True")
    configure_torch_memory(max_split_size_mb=64)
    assert os.environ[VARIABLES[0]] == os.environ[VARIABLES[1]] == "expandable_segments:True,max_split_size_mb:64"


def test_two_variables_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[0], "expandable_segments:True")
    monkeypatch.setenv(VARIABLES[1], "expandable_segments:False")
    with pytest.raises(TorchMemoryError, match="which differ; allowed: one of the two, or the same in both"):
        configure_torch_memory(max_split_size_mb=64)
    monkeypatch.setenv(VARIABLES[1], "expandable_segments:True")
    configure_torch_memory(max_split_size_mb=64)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("garbage_collection_threshold", 0),
        ("garbage_collection_threshold", 1.0),
        ("garbage_collection_threshold", "0.5"),
        ("memory_fraction", 0.0),
        ("memory_fraction", 1.01),
        ("memory_fraction", True),
        ("max_split_size_mb", 20),
        ("max_split_size_mb", "128"),
        ("expandable_segments", "yes"),
    ],
)
def test_values_out_of_their_range(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{setting}: found {value!r}; allowed: "):
        configure_torch_memory(**{setting: value})
    assert not set(VARIABLES) & set(os.environ)


# Before CUDA is initialised, and after --------------------------------------------------------------------------------


def test_too_late_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_memory, "_initialized", lambda: True)
    with pytest.raises(TorchMemoryError) as info:
        configure_torch_memory(garbage_collection_threshold=0.6)
    assert isinstance(info.value, RuntimeError)
    assert info.value.setting == "garbage_collection_threshold"
    text = str(info.value)
    assert text.startswith("garbage_collection_threshold: found CUDA initialised by torch")
    assert "PYTORCH_CUDA_ALLOC_CONF=garbage_collection_threshold:0.6" in text
    assert not set(VARIABLES) & set(os.environ)
    with pytest.raises(TorchMemoryError, match=r"^expandable_segments: "):
        configure_torch_memory(True)


def test_what_holds_already_is_not_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[0], "garbage_collection_threshold:0.6")
    monkeypatch.setattr(torch_memory, "_initialized", lambda: True)
    found = configure_torch_memory(garbage_collection_threshold=0.6)
    assert found.reasons["expandable_segments"] == "left as it is: CUDA is initialised"


@pytest.mark.usefixtures("clean")
def test_the_fraction_may_be_set_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_memory, "_initialized", lambda: True)
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        found = configure_torch_memory(memory_fraction=0.25)
        assert (found.memory_fraction, found.memory_bytes) == (0.25, total // 4)
        assert torch.cuda.get_per_process_memory_fraction() == 0.25
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(total // 3, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_threshold_alone_does_nothing() -> None:
    """torch collects only where a fraction was set."""
    found = configure_torch_memory(None, garbage_collection_threshold=0.6)
    assert found.reasons["garbage_collection_threshold"] == "asked for; no effect before a memory_fraction is set"


def test_in_a_process_of_its_own() -> None:
    """The order that counts: settings, then CUDA; torch may be imported before."""
    found = run(
        """
        import torch
        from jetrt.torch_memory import configure_torch_memory, TorchMemoryError
        report = configure_torch_memory(garbage_collection_threshold=0.8, memory_fraction=0.5)
        found = [report.settings, report.reasons["expandable_segments"], torch.cuda.is_initialized()]
        try:
            configure_torch_memory(garbage_collection_threshold=0.9)
        except TorchMemoryError as error:
            found.append(error.setting)
        """.replace("\n        ", "\n"),
        FAKE_TORCH_EXPANDABLE_SEGMENTS="fail",
    )
    settings, reason, initialized, late = found
    assert settings == {"garbage_collection_threshold": "0.8"}
    assert reason.startswith("off: a child process that tried it failed (")
    assert "operation not supported" in reason
    assert initialized is True
    assert late == "garbage_collection_threshold"


def test_neither_torch_nor_cuda_is_touched_by_the_settings() -> None:
    found = run(
        "import sys\nfrom jetrt.torch_memory import configure_torch_memory\n"
        "configure_torch_memory(None, garbage_collection_threshold=0.8)\nfound = 'torch' in sys.modules"
    )
    assert found is False


# The probe ------------------------------------------------------------------------------------------------------------


def answer(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[dict[str, Any]]:
    """Lets the child process end like this; gives its environment and command."""
    seen: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> Any:
        seen.append({"command": command, **options})
        if isinstance(outcome, BaseException):
            raise outcome
        return types.SimpleNamespace(**outcome)

    monkeypatch.setattr(torch_memory.subprocess, "run", run)
    return seen


def test_the_probe_asks_once_and_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answer(monkeypatch, {"returncode": 0, "stderr": "", "stdout": ""})
    monkeypatch.setenv("LD_LIBRARY_PATH", "/some/where")
    for _ in range(2):
        found = configure_torch_memory(device=0)
        assert found.settings == {"expandable_segments": "True"}
        for name in VARIABLES:
            monkeypatch.delenv(name)
    (child,) = seen
    assert {child["env"][name] for name in VARIABLES} == {"expandable_segments:True"}
    assert child["env"]["LD_LIBRARY_PATH"] == "/some/where"
    assert "cuda:0" in child["command"][-1]
    compile(child["command"][-1], "probe", "exec")


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ({"returncode": 1, "stderr": "Traceback\nRuntimeError: CUDA driver error: out of memory\n"}, "out of memory"),
        ({"returncode": -11, "stderr": ""}, "exit status -11"),
        ({"returncode": 1, "stderr": "ModuleNotFoundError: No module named 'torch'"}, "No module named 'torch'"),
        (subprocess.TimeoutExpired("python", 120), "did not finish"),
        (OSError("no processes left"), "did not finish"),
    ],
)
def test_a_probe_that_fails_leaves_it_off(monkeypatch: pytest.MonkeyPatch, outcome: Any, reason: str) -> None:
    answer(monkeypatch, outcome)
    found = configure_torch_memory()
    assert "expandable_segments" not in found.settings
    assert found.reasons["expandable_segments"].startswith("off: ")
    assert reason in found.reasons["expandable_segments"]


# The report -----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_each_setting_does(probed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probed(True)
    orin = Platform(arch="aarch64", integrated=True)
    monkeypatch.setattr(torch_memory.platform, "identify", lambda: orin)
    found = configure_torch_memory(garbage_collection_threshold=0.6)
    assert found.integrated is True
    text = str(found)
    for name in ("expandable_segments", "garbage_collection_threshold"):
        assert f"{name}: {EFFECTS[name]}" in text
    assert EFFECTS["max_split_size_mb"] not in text
    for effect in EFFECTS.values():
        assert "unified memory" in effect
    assert "max_split_size_mb             not set" in text
