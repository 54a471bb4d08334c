"""Fixtures of the tests that run on the stand-in torch (`fakes/python/torch`), in a pytest process of their own:
`python -m pytest tests/drop_in`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STANDINS = Path(__file__).resolve().parents[2] / "fakes" / "python"

if "torch" in sys.modules and not str(sys.modules["torch"].__file__).startswith(str(STANDINS)):
    raise pytest.UsageError(
        "tests/drop_in run on the stand-in torch, but another one is imported already: start them on their own, "
        "`python -m pytest tests/drop_in`"
    )
if str(STANDINS) not in sys.path:
    sys.path.insert(0, str(STANDINS))
    # Processes that a test starts find it, too.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])])


def more(before: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What lives now beyond that. Modules are kept for the process."""
    import rig

    now = rig.live()
    return {kind: (n, now[kind]) for kind, n in before.items() if now[kind] > n and kind != "module"}


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    item.stash[_failed] = item.stash.get(_failed, False) or call.excinfo is not None
    return (yield)


@pytest.fixture
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing leaks on the device or in TensorRT, nothing was done wrong there, and torch starts afresh."""
    import rig
    import torch

    import jetrt

    jetrt.pinned_empty(1)  # the driver, and what is kept for the process
    torch.cuda.init()
    for device in range(torch.cuda.device_count()):
        for priority in (0, -1):
            torch.cuda.Stream(device, priority)  # torch makes its streams once
        jetrt._core._capture_stream(device)  # and jetrt this one
    torch._standin.reset()
    torch.cuda.set_device(0)
    before = rig.live()
    rig.cuda().reset()
    rig.trt().reset()
    yield
    gc.collect()
    torch.cuda.set_device(0)
    if request.node.stash[_failed]:
        torch._standin.reset()
        return  # its traceback holds what it made
    waits = torch._standin.counts["device_waits"]
    assert rig.cuda().count("cuCtxSynchronize") == waits  # none but those that the test asked for
    torch._standin.reset()
    # What a call discarded is freed by a thread. (A failed test before this one may have held more.)
    rig.until(lambda: not more(before), lambda: f"giving back (kind: live before and now) {more(before)}")
    assert rig.mistakes() == []


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Path]:
    """`plan("mlp", name="m.plan", fields…)` writes a plan of the stand-in TensorRT and gives its path."""
    import fakes

    def write(program: Any = "mlp", /, name: str = "m.plan", **fields: Any) -> Path:
        return fakes.write_plan(tmp_path / name, program, **fields)

    return write
