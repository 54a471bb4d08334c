"""`preload`: the largest first, refused with the arithmetic, found by path; and what each load took."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import groot_rig
import pytest
import rig
import torch
from groot_rig import dit_inputs, same

from jetrt.errors import OutOfMemoryError
from jetrt.groot import TensorRTDiTWrapper, load_report, preload, preloading
from jetrt.groot.engine import Engine

pytestmark = pytest.mark.usefixtures("clean")

MB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left(clean: None) -> Any:
    yield
    preloading.drop_all()


@pytest.fixture
def sized(plan: groot_rig.Write) -> Any:
    """`sized("a.engine", 2.5)`: a plan of about that many MB, whose engine takes as much."""

    def make(name: str, megabytes: float, program: Any = "dit5", **fields: Any) -> Path:
        size = int(megabytes * MB)
        return plan(program, name=name, filler="x" * size, **{"weights_bytes": size, **fields})

    return make


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [Path(row["path"]).name for row in rows]


def test_largest_first_and_what_it_took(sized: Any) -> None:
    paths = [sized("small.engine", 1), sized("large.engine", 5), sized("middle.engine", 3)]
    rows = preload(paths)
    assert names(rows) == ["large.engine", "middle.engine", "small.engine"]
    assert [row["bytes"] for row in rows] == sorted((p.stat().st_size for p in paths), reverse=True)
    for row in rows:
        assert row["device_bytes"] >= row["bytes"] - MB
        assert row["peak_device_bytes"] >= row["device_bytes"]
        assert row["seconds"] > 0
        assert row["peak_host_bytes"] >= 0
        assert row["device"] == 0
    assert load_report()[-3:] == rows


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes a while."""
    original = preloading._core.Engine

    def load(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return original(*args, **kwargs)

    monkeypatch.setattr(preloading._core, "Engine", load)


def test_the_peak_is_seen_while_it_loads(sized: Any, slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT may take memory while it deserialises that it gives back afterwards."""
    path = sized("a.engine", 1)
    readings = iter([100 * MB, 60 * MB])
    monkeypatch.setattr(
        preloading,
        "available",
        lambda device: 10 * MB if threading.current_thread().name == "jetrt-groot-memory" else next(readings),
    )
    engine = preloading.load_core(path, 0, "wrapper")
    row = load_report()[-1]
    assert (row["device_bytes"], row["peak_device_bytes"]) == (40 * MB, 90 * MB)
    engine.close()


def test_a_set_that_cannot_fit_is_refused_before_a_byte_is_read(sized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [sized("a.engine", 3), sized("b.engine", 2)]
    opened = []
    monkeypatch.setattr(preloading._core, "Engine", lambda *args, **kwargs: opened.append(args))
    with pytest.raises(OutOfMemoryError) as info:
        preload(paths, memory_budget="4M")
    assert str(info.value).startswith(
        "these engines do not fit: a.engine 3.0 MiB + b.engine 2.0 MiB = 5.0 MiB; memory_b"
    )
    assert "Nothing was read." in str(info.value)
    assert isinstance(info.value, MemoryError)
    assert info.value.requested == sum(p.stat().st_size for p in paths)
    assert info.value.free == 4 * MB
    assert opened == []
    monkeypatch.setattr(preloading, "available", lambda device: 4 * MB)
    with pytest.raises(OutOfMemoryError, match=r"5\.0 MiB; 4\.0 MiB are free"):
        preload(paths)
    assert opened == []


def test_engines_that_take_more_than_their_plans(sized: Any) -> None:
    """The sizes fit; what the first takes besides leaves no room for the second: both are closed again."""
    paths = [sized("a.engine", 3, device_memory=8 * MB), sized("b.engine", 2)]
    before = rig.trt().live("ICudaEngine")
    with pytest.raises(OutOfMemoryError, match=r"taken by those loaded so far \+ b\.engine.*All that were loaded are"):
        preload(paths, memory_budget=6 * MB)
    assert rig.trt().live("ICudaEngine") == before
    assert preloading.take(paths[0], 0, "wrapper") is None


def test_one_that_cannot_be_loaded_closes_the_others(sized: Any) -> None:
    bad = sized("bad.engine", 1, fail="deserialize")
    before = rig.trt().live("ICudaEngine")
    with pytest.raises(Exception, match="bad"):
        preload([sized("good.engine", 2), bad])
    assert rig.trt().live("ICudaEngine") == before


def test_memory_budget_is_bytes_or_a_size(sized: Any) -> None:
    path = sized("a.engine", 1)
    for budget in (8 * MB, "8M", "8MiB", "1G"):
        preload([path], memory_budget=budget)
        preloading.drop_all()
    for budget in ("many", -1, 1.5):
        with pytest.raises(ValueError, match=r"^memory_budget: found .*; allowed: bytes, or a size"):
            preload([path], memory_budget=budget)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^seam: found 'c'"):
        preload([path], seam="c")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no\.engine"):
        preload([path, path.with_name("no.engine")])


def test_a_wrapper_takes_it_once(sized: Any) -> None:
    path = sized("a.engine", 1)
    preload(str(path))
    count = len(load_report())
    given = dit_inputs()
    first = TensorRTDiTWrapper(path.parent / "." / "a.engine")
    assert same(first(*given), given.expected())
    assert len(load_report()) == count
    second = TensorRTDiTWrapper(path)
    assert len(load_report()) == count + 1
    first.close()
    assert same(second(*given), given.expected())


def test_a_link_leads_to_the_same_engine(sized: Any, tmp_path: Path) -> None:
    path = sized("a.engine", 1)
    link = tmp_path / "link.engine"
    link.symlink_to(path)
    preload([link])
    count = len(load_report())
    TensorRTDiTWrapper(path)
    assert len(load_report()) == count


def test_twice_is_once(sized: Any) -> None:
    path = sized("a.engine", 1)
    assert len(preload([path, path])) == 1
    assert preload([path]) == []


def test_a_plan_that_was_replaced_meanwhile_is_loaded_again(sized: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = sized("a.engine", 1)
    preload([path])
    before = rig.trt().live("ICudaEngine")
    os.utime(path, ns=(1, 1))
    with caplog.at_level(logging.WARNING, "jetrt.groot"):
        wrapper = TensorRTDiTWrapper(path)
    assert "was replaced since it was preloaded" in caplog.text
    assert rig.trt().live("ICudaEngine") == before
    given = dit_inputs()
    assert same(wrapper(*given), given.expected())


def test_the_other_seam_gets_an_engine_of_its_own(sized: Any, caplog: pytest.LogCaptureFixture) -> None:
    """They treat types differently: what a wrapper casts, `Engine` refuses."""
    path = sized("a.engine", 1)
    preload([path])
    before = rig.trt().live("ICudaEngine")
    with caplog.at_level(logging.WARNING, "jetrt.groot"):
        engine = Engine(str(path))
    assert 'was preloaded for seam="wrapper" and is loaded again for seam="engine"' in caplog.text
    assert rig.trt().live("ICudaEngine") == before  # and not twice in memory
    given = dit_inputs()
    for name, value in vars(given).items():
        engine.set_runtime_tensor_shape(name, value.shape)
    with pytest.raises(AssertionError):
        engine(given.sa_embs.float(), *list(given)[1:])


def test_the_plans_of_a_folder_are_for_engines(tmp_path: Path) -> None:
    folder = groot_rig.write_bundle(tmp_path / "bundle")
    (folder / "notes.txt").write_text("no plan")
    rows = preload(folder)
    assert sorted(names(rows)) == sorted(groot_rig.head_plans())
    count = len(load_report())
    engine = Engine(str(folder / "dit_bf16.engine"))
    assert len(load_report()) == count
    engine.close()
    Engine(folder / "dit_bf16.engine")
    assert len(load_report()) == count + 1


def test_a_subclass_of_the_engine_finds_it_too(tmp_path: Path) -> None:
    folder = groot_rig.write_bundle(tmp_path / "bundle")

    class Own(Engine):
        pass

    preload(folder / "dit_bf16.engine", seam="engine")
    count = len(load_report())
    assert isinstance(Own(folder / "dit_bf16.engine"), Own)
    assert len(load_report()) == count


@pytest.fixture(params=[True, None], ids=["unified", "own"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Whose GPU shares the system's memory, or has its own; and what of it was read."""
    found = SimpleNamespace(unified=request.param, identified=0, readings=0)

    def identify() -> Any:
        found.identified += 1
        return preloading.platform.Platform(arch="aarch64", integrated=found.unified)

    def meminfo() -> dict[str, int]:
        found.readings += 1
        return {"MemAvailable": 123 * MB}

    monkeypatch.setattr(preloading.platform, "identify", identify)
    monkeypatch.setattr(preloading.platform, "meminfo", meminfo)
    preloading._unified.cache_clear()
    yield found
    preloading._unified.cache_clear()


def test_available_memory_is_the_systems_where_it_is_shared(machine: SimpleNamespace) -> None:
    """There the driver's figure leaves out what the page cache would give back."""
    assert preloading.available(0) == (123 * MB if machine.unified else torch.cuda.mem_get_info(0)[0])


def test_the_machine_is_identified_once(sized: Any, slow: None, machine: SimpleNamespace) -> None:
    """Not in each reading while an engine loads."""
    preloading.load_core(sized("a.engine", 1), 0, "wrapper").close()
    assert machine.identified == 1
    assert (machine.readings > 2) is (machine.unified is True)
