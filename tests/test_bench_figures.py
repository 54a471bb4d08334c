"""What a bench computes: percentiles, warm-up, verdicts, totals, what sensors may say; without any runtime."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import re
import shlex
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt.bench.files import Files, csv_text
from jetrt.bench.markdown import markdown
from jetrt.bench.options import RUNTIMES, BenchOptions
from jetrt.bench.results import COLUMNS, BenchReport, Row, Status, total
from jetrt.bench.telemetry import HostMemory, Reading, Telemetry
from jetrt.bench.timing import (
    MIN_WARMUP_SECONDS,
    STABLE,
    WINDOW,
    Call,
    Plan,
    Sample,
    Summary,
    Warmed,
    measure,
    percentile,
    warm_up,
)
from jetrt.bench.trtexec import commands
from jetrt.bench.verdict import LIMITS, Cause, judge
from jetrt.commands.bench import add_bench

TIMES = st.lists(st.floats(1e-6, 1e6, allow_nan=False), min_size=1, max_size=300)


def report(rows: list[Row]) -> BenchReport:
    return BenchReport(rows, BenchOptions().to_mapping(), {}, "2026-01-01T00:00:00+00:00")


# Figures --------------------------------------------------------------------------------------------------------------


@given(TIMES, st.floats(0.001, 1))
def test_a_percentile_is_a_sample_that_this_share_does_not_exceed(times: list[float], share: float) -> None:
    ordered = sorted(times)
    found = percentile(ordered, share)
    assert found in times
    assert sum(value <= found for value in times) >= share * len(times) - 1e-9
    assert sum(value < found for value in times) < share * len(times)


@given(TIMES)
def test_a_summary_is_in_order(times: list[float]) -> None:
    summary = Summary.of(times)
    assert summary is not None
    assert summary.calls == len(times)
    assert summary.min <= summary.median <= summary.p90 * (1 + 1e-12) or len(times) < 10
    assert summary.min <= summary.p90 <= summary.p99 <= summary.max
    assert min(times) * (1 - 1e-12) <= summary.mean <= max(times) * (1 + 1e-12)


def test_of_known_samples() -> None:
    assert Summary.of([float(n) for n in range(1, 101)]) == Summary(100, 1, 50.5, 50.5, 90, 99, 100)
    assert Summary.of([]) is None


# Warm-up --------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only in calls."""

    def __init__(self, *milliseconds: float) -> None:
        self.now, self.calls = 0.0, 0
        self._next = list(milliseconds)

    def __call__(self) -> float:
        return self.now

    def call(self) -> Sample:
        took = self._next.pop(0) if len(self._next) > 1 else self._next[0]
        self.calls += 1
        self.now += took / 1e3
        return Sample(took)


def test_warm_up_ends_when_two_windows_agree() -> None:
    clock = Clock(*[100.0 - n for n in range(40)], 50.0)
    warmed = warm_up(clock.call, Plan(), clock=clock)
    assert (warmed.stable, warmed.reason) == (True, "")
    assert 50 <= warmed.calls <= 61  # the last falling call has left both windows, or nearly


def test_warm_up_that_stays_unstable_says_so() -> None:
    clock = Clock(*[1.1**n for n in range(90)], 1e4)
    warmed = warm_up(clock.call, Plan(max_seconds=3), clock=clock)
    assert not warmed.stable
    assert warmed.reason.startswith("two windows of 10 calls still differed by more than 2% after ")


def test_warm_up_of_slow_calls_says_that_they_were_too_few() -> None:
    clock = Clock(4000.0)
    warmed = warm_up(clock.call, Plan(), clock=clock)
    assert (warmed.calls, warmed.stable) == (3, False)
    assert warmed.reason == "3 calls took 12.0 s, too few to compare two windows of 10"


def test_warm_up_takes_its_least_calls_and_time() -> None:
    clock = Clock(0.01)
    assert warm_up(clock.call, Plan(min_calls=7), clock=clock).seconds >= 0.2
    clock = Clock(50.0)
    assert warm_up(clock.call, Plan(min_calls=33), clock=clock).calls == 33


# Measuring ------------------------------------------------------------------------------------------------------------


def test_measuring_ends_at_the_calls_and_the_seconds() -> None:
    found = measure([lambda: Sample(1.0)], Plan(calls=7, seconds=0))
    assert (len(found.samples), found.stopped, found.limited) == (7, None, False)
    begin = time.perf_counter()
    found = measure([lambda: Sample(1.0)], Plan(calls=1, seconds=0.05))
    assert time.perf_counter() - begin >= 0.05
    assert len(found.samples) > 1


def test_the_time_limit_ends_a_row_of_slow_calls() -> None:
    def slow() -> Sample:
        time.sleep(0.01)
        return Sample(10.0)

    found = measure([slow], Plan(calls=10_000, seconds=100, limit_seconds=0.05))
    assert found.limited
    assert 0 < len(found.samples) < 100


def test_idle_time_is_not_busy_time() -> None:
    found = measure([lambda: Sample(0.0)], Plan(calls=5, seconds=0, idle_ms=20))
    assert found.busy_seconds < 0.04  # four pauses of 20 ms are out of it


def test_samples_of_several_threads_are_in_the_order_of_the_calls() -> None:
    """A drift over time is seen, and two threads of different speed are none."""

    def call_of(place: int) -> Call:
        numbers = itertools.count()
        return lambda: Sample(float(10 * next(numbers) + place))

    found = measure([call_of(0), call_of(1)], Plan(calls=3, seconds=0))
    assert [sample.end_to_end for sample in found.samples] == [0, 1, 10, 11, 20, 21]


def test_threads_call_at_once_and_each_its_own() -> None:
    meeting = threading.Barrier(3, timeout=10)
    names = set()

    def call() -> Sample:
        meeting.wait()  # would time out if they came one after the other
        names.add(threading.get_ident())
        return Sample(1.0)

    found = measure([call, call, call], Plan(calls=4, seconds=0))
    assert found.stopped is None
    assert (len(found.samples), len(names)) == (12, 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_ends_it_and_keeps_the_samples(threads: int) -> None:
    calls = iter(range(100))

    def call() -> Sample:
        if next(calls) == 5:
            raise ValueError("no such frame")
        return Sample(1.0)

    found = measure([call] * threads, Plan(calls=50, seconds=0))
    assert isinstance(found.stopped, ValueError)
    assert found.samples


def test_ctrl_c_ends_it_and_keeps_the_samples() -> None:
    calls = iter(range(100))

    def call() -> Sample:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return Sample(1.0)

    found = measure([call], Plan(calls=50, seconds=0))
    assert isinstance(found.stopped, KeyboardInterrupt)
    assert len(found.samples) == 5


# Verdicts -------------------------------------------------------------------------------------------------------------

WARM = Warmed(20, 1.0, True)
COOL = Reading(throttle_active=False, power_throttle_active=False)
HOT = Reading(throttle_active=True, power_throttle_active=False)
CAPPED = Reading(throttle_active=False, power_throttle_active=True, reasons=("sw_power_cap",))


@pytest.mark.parametrize(
    ("times", "verdict", "reason"),
    [
        ([1.0] * 100, "stable", ""),
        ([1.0] * 19, "", "19 calls, fewer than 20: no verdict"),
        ([1.0] * 60 + [1.3] * 40, "unstable", "spread: (p90 - p10) / median is 0.30, above 0.15"),
        ([*[1.0] * 98, 9.0, 9.0], "unstable", "tail: p99 is 9.0 times the median, above 2.0"),
        ([1.0 + n / 1000 for n in range(100)], "unstable", "drift: the last third is +6.4% from the first"),
    ],
)
def test_the_verdict_follows_the_rules(times: list[float], verdict: str, reason: str) -> None:
    found, reasons, throttled_by = judge(times, WARM, None, None)
    assert (found, throttled_by) == (verdict, [])
    assert "; ".join(reasons).startswith(reason)


def test_an_unstable_warm_up_counts() -> None:
    assert judge([1.0] * 100, Warmed(3, 1.0, False, "too few"), None, None) == ("unstable", ["warm-up: too few"], [])


@pytest.mark.parametrize(
    ("before", "after", "causes", "reason"),
    [
        (Reading(), Reading(), [], ""),
        (Reading(throttle_active=False), Reading(power_throttle_active=False), [], ""),
        (COOL, CAPPED, ["power"], "power throttling after the row: sw_power_cap"),
        (CAPPED, CAPPED, ["power"], "power throttling before and after the row: sw_power_cap"),
        (HOT, COOL, ["thermal"], "thermal throttling before the row: the sensors gave no reason"),
        (
            HOT,
            CAPPED,
            ["thermal", "power"],
            "thermal throttling before the row: the sensors gave no reason; power throttling after the row: sw_power",
        ),
        (Reading(gpu_clock_mhz=1980), Reading(gpu_clock_mhz=1200), ["clock"], "the GPU clock fell from 1980 to 1200"),
        (
            Reading(gpu_clock_mhz=1980),
            replace(CAPPED, gpu_clock_mhz=1200),
            ["power", "clock"],
            "power throttling after the row: sw_power_cap; the GPU clock fell",
        ),
        (Reading(gpu_clock_mhz=345), Reading(gpu_clock_mhz=1980), [], ""),  # it woke up
        (Reading(gpu_clock_mhz=1980), Reading(), [], ""),
    ],
)
def test_throttling_goes_before_everything_and_what_is_unknown_counts_neither_way(
    before: Reading, after: Reading, causes: list[str], reason: str
) -> None:
    found, reasons, throttled_by = judge([1.0] * 100, WARM, before, after)
    assert (found, throttled_by) == ("throttled" if causes else "stable", causes)
    assert "; ".join(reasons).startswith(reason)
    unstable = judge([1.0 + n / 1000 for n in range(100)], WARM, before, after)
    assert (unstable.verdict, unstable.throttled_by) == ("throttled" if causes else "unstable", causes)


def test_a_throttled_row_says_by_what() -> None:
    """The word of the CSV stays one of three; people and programs are told the cause beside it."""
    row = Row("m", "plan", "fp16", "tensorrt", 1, 1, status="ok", after=CAPPED)
    row.verdict, row.verdict_reasons, row.throttled_by = judge([1.0] * 100, WARM, COOL, CAPPED)
    assert (row.cells()["verdict"], row.cells()["throttled_by"]) == ("throttled", "power")
    assert row.to_mapping()["throttled_by"] == ["power"]
    for text in (report([row]).table(), markdown(report([row]))):
        assert "throttled (power)" in text
        assert "throttled: power throttling after the row: sw_power_cap" in text


@given(st.lists(st.floats(0, 1e9), max_size=200), st.booleans())
def test_a_verdict_is_one_of_four_and_has_reasons_unless_stable(times: list[float], stable: bool) -> None:
    found, reasons, _ = judge(times, Warmed(1, 1.0, stable, "x"), None, None)
    assert found in ("stable", "unstable", "")
    assert bool(reasons) == (found != "stable")
    assert (found == "") == (len(times) < LIMITS["calls"])


# Sensors --------------------------------------------------------------------------------------------------------------


def snapshot(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(throttle_active=None, power_throttle_active=None, reasons=(), power_mode=None, **values)


def test_negative_clocks_and_other_garbage_are_blank() -> None:
    found = Reading.of(snapshot(gpu_clock_mhz=-5, gpu_temp_c=math.nan, power_w=1e9, cpu_temp_c=41.5, gpu_load=True))
    assert (found.gpu_clock_mhz, found.gpu_temp_c, found.power_w, found.gpu_load) == (None, None, None, None)
    assert found.cpu_temp_c == 41.5
    assert found.garbage == ("gpu_temp_c is nan", "gpu_clock_mhz is -5", "power_w is 1000000000.0")
    row = Row("m", "onnx", "fp32", "onnx_cpu", 1, 1, after=found)
    cells = row.cells()
    assert (cells["gpu_clock_mhz"], cells["power_w"], cells["gpu_temp_c"]) == ("", "", "")
    assert cells["cpu_temp_c"] == "41.50"


def test_sensors_were_silent_when_no_reading_told_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monitor = SimpleNamespace(snapshot=lambda: given.pop(0))
    monkeypatch.setitem(sys.modules, "jetrt.thermal", SimpleNamespace(monitor=lambda _: monitor))
    empty, full = snapshot(), snapshot(gpu_temp_c=50.0)
    empty.power_mode = "MAXN"  # which no sensor tells
    for readings, silent in (([], None), ([empty, empty], True), ([full, empty], False), ([empty, full], False)):
        given[:] = readings
        found = Telemetry()
        for _ in readings:
            found.read()
        assert found.silent is silent


@given(st.one_of(st.none(), st.floats(), st.integers(), st.text(), st.booleans()))
def test_whatever_a_sensor_says_is_plausible_or_blank(value: Any) -> None:
    found = Reading.of(snapshot(gpu_clock_mhz=value))
    assert found.gpu_clock_mhz is None or 1 <= found.gpu_clock_mhz <= 10_000


@pytest.mark.parametrize("heat", [None, False, True])
@pytest.mark.parametrize("power", [None, False, True])
def test_unknown_throttling_is_unknown(heat: bool | None, power: bool | None) -> None:
    found = Reading.of(SimpleNamespace(throttle_active=heat, power_throttle_active=power, reasons=()))
    assert (found.throttle_active, found.power_throttle_active) == (heat, power)
    assert Reading.of(SimpleNamespace()) == Reading()


def test_the_peak_of_host_memory_is_that_of_the_row() -> None:
    before = HostMemory()
    if not before.resettable:
        pytest.skip("this kernel does not let the peak be set back")
    held = bytearray(64 << 20)
    peak = before.peak()
    assert peak is not None
    assert before.before is not None
    assert peak - before.before > 60 << 20
    del held
    later = HostMemory().peak()
    assert later is not None
    assert later < peak


def test_a_peak_that_cannot_be_set_back_is_unknown(tmp_path: Any) -> None:
    (tmp_path / "status").write_text("VmHWM:\t 5000 kB\nVmRSS:\t 4000 kB\n")
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    memory = HostMemory(tmp_path)
    assert (memory.before, memory.peak()) == (4000 << 10, None)


# Rows, totals, CSV ----------------------------------------------------------------------------------------------------


def row(model: str, median: float | None, runtime: str = "tensorrt", **more: Any) -> Row:
    summary = None if median is None else Summary(100, median, median, median, median, median, median)
    values = {"status": "ok" if median is not None else "skipped", **more}
    return Row(model, "onnx", "fp16", runtime, 1, 1, end_to_end=summary, **values)


def test_a_pipeline_has_a_total_for_each_runtime_and_for_the_fastest_of_each() -> None:
    found = total([row("a", 2), row("b", 3), row("a", 20, "onnx_cpu"), row("b", 1, "onnx_cpu")])
    assert [(r.runtime, r.end_to_end and r.end_to_end.median, r.status) for r in found] == [
        ("tensorrt", 5, "ok"),
        ("onnx_cpu", 21, "ok"),
        ("fastest", 3, "ok"),
    ]
    assert found[0].fps == 200
    assert found[2].notes == ["a: fp16 tensorrt batch 1", "b: fp16 onnx_cpu batch 1"]
    assert found[0].cells()["p99_ms"] == ""  # percentiles do not add up


def test_the_fastest_of_each_says_which_of_them_is_wrong() -> None:
    (*_, fastest) = total([row("a", 2), row("b", 1, accuracy={"state": "failed"}), row("b", 3, "onnx_cpu")])
    assert fastest.notes == ["a: fp16 tensorrt batch 1", "b: fp16 tensorrt batch 1, whose accuracy failed"]


def test_a_total_with_a_component_missing_has_no_time() -> None:
    found = total([row("a", 2), row("b", None)])
    assert [(r.runtime, r.status, r.reason, r.end_to_end) for r in found] == [
        ("tensorrt", "incomplete", "no row of b is ok", None),
        ("fastest", "incomplete", "no row of b is ok", None),
    ]


def test_one_component_has_no_total() -> None:
    assert total([row("a", 2), row("a", 3, "onnx_cpu")]) == []


def test_the_csv_has_the_columns_that_reports_read() -> None:
    assert ",".join(COLUMNS).startswith(
        "model,imgsz,precision,runtime,batch,mean_ms,median_ms,p90_ms,p99_ms,fps,status,"
    )
    text = csv_text(report([row("det", 2.0, "openvino_cpu", imgsz="480", reason="a, b\nand\rc")]))
    (found,) = csv.DictReader(io.StringIO(text))
    assert found["runtime"] == "ovcpu"
    assert found["reason"] == "a, b and c"
    assert (found["mean_ms"], found["fps"], found["gpu_ms"]) == ("2.0000", "", "")


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_stays_in_its_cell(model: str, reason: str) -> None:
    text = csv_text(report([row(model, None, reason=reason)]))
    (found,) = csv.DictReader(io.StringIO(text, newline=""))
    assert found["status"] == "skipped"


def test_what_is_no_utf_8_is_written(tmp_path: Path) -> None:
    """A file's name, or a message, as Python gives what it cannot decode."""
    files = Files(tmp_path, picture=False)
    files.keep(report([row("caf\udce9", None, reason="\udcff\0")]))
    (found,) = csv.DictReader(next(tmp_path.glob("*.csv")).read_text(encoding="utf-8").splitlines())
    assert (found["model"], found["reason"]) == (r"caf\udce9", "\\udcff\ufffd")
    assert json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))["rows"][0]["model"] == "caf\udce9"
    assert r"caf\udce9" in next(tmp_path.glob("*.md")).read_text(encoding="utf-8")


def test_the_size_names_the_files() -> None:
    assert report([row("a", 1, imgsz="480"), row("b", 1)]).size == "480"
    assert report([row("a", 1, imgsz="480"), row("b", 1, imgsz="640")]).size == "mixed"
    assert report([row("a", None)]).size == ""


# trtexec --------------------------------------------------------------------------------------------------------------


def test_the_commands_of_both_majors_say_everything_whose_default_changed() -> None:
    more = {"timing": Plan(calls=10, seconds=1), "threads": 1, "device": 0}
    found = commands("a b.engine", {"x": (1, 3, 4, 4), "s": ()}, graph=True, copies=True, **more)  # type: ignore[arg-type]
    assert found["10.x"].startswith("trtexec '--loadEngine=a b.engine' --shapes=x:1x3x4x4,s:scalar ")
    assert "--useCudaGraph" in found["10.x"]
    assert "--noDataTransfers" not in found["10.x"]
    assert "--includeDataTransfers" in found["11.x"]
    assert "--noCudaGraph" not in found["11.x"]
    found = commands("m.engine", {}, graph=False, copies=False, **more)  # type: ignore[arg-type]
    assert "--useCudaGraph" not in found["10.x"]
    assert "--noDataTransfers" in found["10.x"]
    assert "--noCudaGraph" in found["11.x"]
    assert "--includeDataTransfers" not in found["11.x"]
    assert "--shapes" not in found["10.x"]


# docs/tools.md --------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
(PAGE,) = re.findall(r"\n## bench\n(.*?)(?=\n## |\Z)", (ROOT / "docs/tools.md").read_text(encoding="utf-8"), re.S)


def test_the_page_has_the_thresholds_and_defaults() -> None:
    *_, throttled, unstable = re.findall(r"\n\| (?:throttled \(\w+\)|unstable) \| (.*?) \|", PAGE)
    assert re.findall(r"\n\| throttled \((\w+)\)", PAGE) == list(get_args(Cause))
    assert re.findall(r"\d+\.\d+", throttled) == [str(LIMITS["clock"])]
    assert re.findall(r"\d+\.\d+", unstable) == [str(LIMITS[name]) for name in ("spread", "tail", "drift")]
    assert f"fewer than {LIMITS['calls']} calls" in PAGE
    plan = Plan()
    assert f"at least {plan.calls} calls (`--iterations`) and {plan.seconds:g} s (`--duration`)" in PAGE
    assert f"at most {plan.limit_seconds:g} s (`--time-limit`)" in PAGE
    rule = f"two windows of {WINDOW} calls differ by no more than {100 * STABLE:.0f} %, after {plan.min_calls} calls"
    assert rule in " ".join(PAGE.split())
    assert f"{MIN_WARMUP_SECONDS:g} s at the earliest, after {plan.max_seconds:g} s (`--warmup-limit`)" in PAGE


def test_the_page_names_every_status_runtime_and_option() -> None:
    for status in get_args(Status):
        assert re.search(rf"^\| (?:\w+, )?{status}\b", PAGE, re.M), status
    for runtime, entry in RUNTIMES.items():
        assert f"`{runtime}`" in PAGE
        assert entry.csv in PAGE
    parser = argparse.ArgumentParser()
    add_bench(parser)
    known = {flag for action in parser._actions for flag in action.option_strings}
    prose = re.sub(r"\[.*?\]\(.*?\)", "", PAGE)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) <= known


def test_the_commands_of_the_page_are_understood() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_bench(parser)
    lines = re.findall(r"^jetrt bench (.*)$", PAGE, re.M)
    assert len(lines) == 4
    for line in lines:
        parser.parse_args(shlex.split(line, comments=True))
