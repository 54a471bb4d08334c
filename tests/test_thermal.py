"""Temperatures, clocks and throttling: on the files of boards, on NVML's traps, and with sources that hang."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boards
import pytest
from boards import BOARDS, EAGAIN, H200, Code, FakeNvml, lay_out
from hypothesis import given
from hypothesis import strategies as st

from jetrt import thermal
from jetrt.errors import TelemetryUnavailableError
from jetrt.logs import configure_json_logging
from jetrt.runtime import ThermalState
from jetrt.thermal import Reading, ThermalMonitor, polling
from jetrt.thermal.nvml import NvmlSource
from jetrt.thermal.reading import Absent, merge, state_of
from jetrt.thermal.sysfs import SysfsSource

INTERVAL = 0.1
NEVER = 30.0  # a wait this long has failed


def until(condition: Callable[[], Any], what: str = "") -> Any:
    deadline = time.monotonic() + NEVER
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never: {what or condition}"
        time.sleep(0.002)
    return found


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Callable[[Mapping[str, Any]], Path]]:
    """Lays out the files of a board and returns its root."""
    held: list[int] = []

    def make(files: Mapping[str, Any]) -> Path:
        held.extend(lay_out(tmp_path, files))
        return tmp_path

    yield make
    for fd in held:
        os.close(fd)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeNvml | None], None]:
    def put(module: FakeNvml | None) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            monkeypatch.delenv(name, raising=False)

    put(None)  # not installed
    return put


@pytest.fixture
def started(nvml: object) -> Iterator[Callable[..., ThermalMonitor]]:
    """Monitors that end with the test."""
    running: list[ThermalMonitor] = []

    def start(**options: Any) -> ThermalMonitor:
        running.append(ThermalMonitor(**{"interval_s": INTERVAL, "wait_s": 10, **options}))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts other sources in place of the real ones."""

    def put(*given: Any) -> None:
        monkeypatch.setattr(ThermalMonitor, "_sources", lambda self: list(given))

    return put


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v not in (None, (), {}) and k not in ("source", "measured_at")}


# ---------------------------------------------------------------------------------------------------------- boards

ON_BOARDS = {
    "orin_nano_jp6": {
        "cpu_temp_c": 48.062,
        "gpu_temp_c": 47.5,
        "throttle_active": False,
        "gpu_clock_mhz": 612,
        "gpu_clock_max_mhz": 1020,
        "gpu_load": 0.423,
        "power_w": 5072 * 1136 / 1e6,
        "rails_w": {"VDD_IN": 5.761792, "VDD_CPU_GPU_CV": 1.053312, "VDD_SOC": 1.82304},
        "over_current_events": {"oc1": 0, "oc2": 0, "oc3": 0},
        "power_mode": "MAXN_SUPER",
    },
    "orin_agx_jp5": {
        "cpu_temp_c": 42.593,
        "throttle_active": False,
        "gpu_clock_max_mhz": 1300,
        "gpu_load": 0.0,
        "rails_w": {"VDD_GPU_SOC": 2.3952, "VDD_CPU_CV": 0.3992, "VIN_SYS_5V0": 4.032, "VDDQ_VDD2_1V8AO": 0.30384},
        "over_current_events": {"oc1": 0, "oc2": 0, "oc3": 0},
        "unreadable": ("GPU-therm",),
        "power_mode": "MAXN",
    },
    "orin_jp72": {
        "cpu_temp_c": 42.312,
        "gpu_temp_c": 41.25,
        "throttle_active": False,
        "gpu_clock_mhz": 612,
        "gpu_clock_max_mhz": 1300,
        "gpu_load": 0.18,
        "rails_w": {"VDD_GPU_SOC": 3.12, "VDD_CPU_CV": 1.44, "VIN_SYS_5V0": 2.873272},
        "over_current_events": {"oc1": 0, "oc2": 0, "oc3": 0},
        "power_mode": "MAXN",
    },
    "thor_r38": {
        "cpu_temp_c": 49.75,
        "throttle_active": False,
        "gpu_clock_max_mhz": 1575,
        "memory_clock_mhz": 4266,
        "power_w": 28.906,
        "rails_w": {"VDD_GPU": 0.0, "VDD_CPU_SOC_MSS": 6.0, "VIN_SYS_5V0": 5.5, "VIN": 28.906},
        "unreadable": ("gpu-thermal",),
        "power_mode": "120W",
    },
    "thor_r39": {
        "cpu_temp_c": 58.25,
        "gpu_temp_c": 56.937,
        "throttle_active": False,
        "gpu_clock_mhz": 1574,
        "gpu_clock_max_mhz": 1575,
        "memory_clock_mhz": 4266,
        "power_w": 124.48,
        "rails_w": {"VDD_GPU": 37.94, "VDD_CPU_SOC_MSS": 30.06, "VIN_SYS_5V0": 15.485, "VIN": 124.48},
        "over_current_events": {"oc1": 0, "oc2": 0, "oc3": 1},
        "power_mode": "MAXN",
    },
    "spark": {"cpu_temp_c": 46.5},
    "x86": {"cpu_temp_c": 61.0},
}


@pytest.mark.parametrize("name", BOARDS)
def test_what_the_files_of_a_board_say(name, board):
    source = SysfsSource(board(BOARDS[name]))
    sample = dict(source.sample())
    assert sample.pop("integrated_gpu") == (name not in ("spark", "x86"))
    assert known(sample) == ON_BOARDS[name]
    # The second look has the counters of the first to compare with.
    counts = "over_current_events" in ON_BOARDS[name]
    assert source.sample()["power_throttle_active"] == (False if counts else None)


def test_sources_are_named(board):
    sample = SysfsSource(board(BOARDS["thor_r39"])).sample()
    assert sample["source"] == {
        "cpu_temp_c": "cpu-thermal",
        "gpu_temp_c": "gpu-thermal",
        "throttle_active": "cooling devices",
        "gpu_clock_mhz": "devfreq gpu-gpc-0",
        "gpu_clock_max_mhz": "devfreq gpu-gpc-0",
        "memory_clock_mhz": "devfreq bwmgr",
        "power_w": "VIN",
    }


#: Board, NVML on it, and what the two say together.
TOGETHER = [
    ("orin_nano_jp6", boards.ORIN_NVML, (48.062, 47.5, False, 612)),
    ("orin_nano_jp6", boards.ORIN_GARBAGE, (48.062, 47.5, False, 612)),
    ("orin_agx_jp5", None, (42.593, None, False, None)),
    ("orin_jp72", boards.ORIN_NVML, (42.312, 41.25, False, 612)),
    ("thor_r38", boards.THOR_R38_NVML, (49.75, None, False, None)),
    ("thor_r39", boards.THOR_R39_NVML, (58.25, 56.937, False, 1574)),
    ("spark", boards.SPARK_NVML, (46.5, 52.0, False, 2418)),
    ("x86", FakeNvml(H200), (61.0, 41.0, False, 1980)),
    ("x86", FakeNvml({**H200, "nvmlDeviceGetCurrentClocksEventReasons": 0x20}), (61.0, 41.0, True, 1980)),
]


@pytest.mark.parametrize(("name", "module", "expected"), TOGETHER)
def test_states_of_boards(name, module, expected, board, nvml, started):
    nvml(module)
    watched = started(root=board(BOARDS[name]))
    state = watched.state()
    assert (
        state.cpu_temp_c,
        state.gpu_temp_c,
        state.thermal_throttle_active,
        state.measured_clock_mhz,
    ) == expected
    assert watched.require() == state or watched.require().measured_at > state.measured_at
    assert 0 <= time.monotonic_ns() - watched.state().measured_at < 10e9


def test_one_source_fills_in_for_another(board, nvml, started):
    nvml(boards.THOR_R39_NVML)
    files = {**BOARDS["thor_r39"], "sys/class/thermal/thermal_zone1/temp": EAGAIN}
    reading = started(root=board(files)).snapshot()
    # The kernel's zone is gated; its watts are of the whole module, NVML's of the GPU.
    assert (reading.gpu_temp_c, reading.source["gpu_temp_c"]) == (57.0, "nvml")
    assert (reading.gpu_load, reading.source["gpu_load"]) == (0.87, "nvml")
    assert (reading.power_w, reading.source["power_w"]) == (124.48, "sysfs: VIN")
    assert (reading.power_mode, reading.source["power_mode"]) == ("MAXN", "sysfs")
    assert reading.unreadable == ("gpu-thermal",)


def test_a_card_beside_an_integrated_gpu(board, nvml, started):
    # IGX Orin with a card: what the processor's files say of its own GPU is not about CUDA's.
    nvml(FakeNvml(H200, ("NVIDIA RTX 6000 Ada Generation",)))
    reading = started(root=board(BOARDS["orin_jp72"])).snapshot()
    assert (reading.cpu_temp_c, reading.gpu_temp_c, reading.gpu_clock_mhz) == (42.312, 41.0, 1980)
    assert (reading.throttle_active, reading.source["throttle_active"]) == (False, "nvml")
    nvml(FakeNvml({"nvmlDeviceGetTemperature": 41}, ("NVIDIA RTX 6000 Ada Generation",)))
    reading = started(root=board({})).snapshot()
    assert (reading.gpu_temp_c, reading.throttle_active, reading.gpu_clock_mhz) == (41.0, None, None)


def cooler_of(root: Path, kind: str) -> Path:
    (found,) = [p.parent for p in root.glob("sys/class/thermal/cooling_device*/type") if p.read_text().strip() == kind]
    return found / "cur_state"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("orin_nano_jp6", "gpu-throttle-alert"),
        ("orin_nano_jp6", "devfreq-17000000.gpu"),
        ("orin_agx_jp5", "thermal-devfreq-0"),
        ("thor_r38", "soc345-throttle-alert"),
        ("thor_r39", "cpufreq-cpu12"),
    ],
)
def test_throttling_enters_and_leaves_and_both_are_logged(name, kind, board, started, caplog):
    caplog.set_level("INFO", "jetrt")
    root = board(BOARDS[name])
    watched = started(root=root)
    assert watched.require().thermal_throttle_active is False
    cooler_of(root, kind).write_text("1\n")
    until(lambda: watched.state().thermal_throttle_active)
    assert watched.snapshot().reasons == (kind,)
    cooler_of(root, kind).write_text("0\n")
    until(lambda: not watched.state().thermal_throttle_active)
    until(lambda: len(caplog.records) == 2)
    entered, left = caplog.records
    state = watched.state()
    degrees = "unknown" if state.gpu_temp_c is None else f"{state.gpu_temp_c:.0f}C"
    clock = "unknown" if state.measured_clock_mhz is None else f"{state.measured_clock_mhz}mhz"
    assert entered.getMessage() == f"thermal throttle active; gpu_temp={degrees}; clock={clock}; reasons={kind}"
    assert left.getMessage() == f"thermal throttle ended; gpu_temp={degrees}; clock={clock}; reasons=none"
    assert (entered.event, left.event) == ("thermal_throttle_entered", "thermal_throttle_left")
    assert (entered.name, entered.levelname, left.levelname) == ("jetrt.thermal", "WARNING", "WARNING")
    assert entered.fields["reasons"] == [kind]
    assert entered.fields["clock_mhz"] == state.measured_clock_mhz


def test_a_surface_that_is_hot_to_touch_is_no_throttle(board, started, caplog):
    root = board(BOARDS["orin_nano_jp6"])
    cooler_of(root, "hot-surface-alert").write_text("1\n")
    cooler_of(root, "pwm-fan").write_text("4\n")
    watched = started(root=root)
    assert watched.snapshot().throttle_active is False
    assert not caplog.records


def test_over_current_is_told_apart(board, started, caplog):
    caplog.set_level("INFO", "jetrt")
    root = board(BOARDS["thor_r39"])
    watched = started(root=root)
    until(lambda: watched.snapshot().power_throttle_active is False)
    assert watched.snapshot().over_current_events["oc3"] == 1, "one at boot, and nothing since"
    (root / "sys/class/hwmon/hwmon9/oc3_event_cnt").write_text("2\n")
    until(lambda: "soctherm_oc oc3" in watched.snapshot().reasons)
    assert watched.state().thermal_throttle_active is False
    until(lambda: watched.snapshot().power_throttle_active is False)
    until(lambda: len(caplog.records) == 2)
    assert [r.event for r in caplog.records] == ["power_throttle_entered", "power_throttle_left"]
    assert {r.levelname for r in caplog.records} == {"INFO"}


def test_the_power_mode_is_read_again_when_it_changes(board, started):
    root = board(BOARDS["orin_nano_jp6"])
    watched = started(root=root)
    assert watched.snapshot().power_mode == "MAXN_SUPER"
    (root / "var/lib/nvpmodel/status").write_text("pmode:0001 \n")
    until(lambda: watched.snapshot().power_mode == "25W")


# --------------------------------------------------------------------------------------------- files gone wrong


@pytest.mark.parametrize("text", ["", "\n", "N/A\n", "-256000\n", "0\n", "4294711296\n", "\0\0\0", "12.5.1", "9" * 600])
def test_garbage_in_place_of_a_temperature(text, board, started):
    root = board({**BOARDS["orin_nano_jp6"], "sys/class/thermal/thermal_zone1/temp": text})
    reading = started(root=root).snapshot()
    assert (reading.gpu_temp_c, reading.unreadable) == (None, ("gpu-thermal",))
    assert reading.cpu_temp_c == 48.062


@pytest.mark.parametrize("text", ["-612000000\n", "nan\n", "18446744073709551615\n"])
def test_clocks_that_cannot_be(text, board, started):
    root = board({**BOARDS["orin_nano_jp6"], "sys/class/devfreq/17000000.gpu/cur_freq": text})
    reading = started(root=root).snapshot()
    assert (reading.gpu_clock_mhz, reading.gpu_clock_max_mhz) == (None, 1020)
    assert reading.unreadable == ("devfreq 17000000.gpu",)
    assert started(root=root).state().measured_clock_mhz is None


def test_files_that_cannot_be_read(board, started):
    root = board(BOARDS["orin_nano_jp6"])
    for path in (root / "sys/class/thermal/thermal_zone0/temp", root / "sys/class/devfreq/17000000.gpu/cur_freq"):
        path.unlink()
        path.mkdir()  # a folder, since permissions do not keep root out
    reading = started(root=root).snapshot()
    assert (reading.cpu_temp_c, reading.gpu_clock_mhz) == (None, None)
    assert set(reading.unreadable) == {"cpu-thermal", "devfreq 17000000.gpu"}
    assert reading.gpu_temp_c == 47.5


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not keep root out")
def test_permission_denied(board, started):
    root = board(BOARDS["orin_nano_jp6"])
    (root / "sys/class/thermal/thermal_zone1/temp").chmod(0)
    reading = started(root=root).snapshot()
    assert (reading.gpu_temp_c, reading.unreadable) == (None, ("gpu-thermal",))


@pytest.mark.parametrize(
    "path",
    [
        "sys/class/thermal/thermal_zone1/temp",
        "sys/class/thermal/thermal_zone1/type",
        "sys/class/thermal/cooling_device0/type",
        "sys/class/hwmon/hwmon1/name",
        "sys/class/hwmon/hwmon3/oc1_event_cnt",
        "sys/class/devfreq/17000000.gpu/cur_freq",
        "var/lib/nvpmodel/status",
        "sys/class/dmi/id/product_name",
    ],
)
def test_a_named_pipe_that_nobody_writes_to_blocks_nothing(path, board):
    root = board(BOARDS["orin_nano_jp6"])
    (root / path).unlink(missing_ok=True)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(root / path)
    done = threading.Event()
    source = SysfsSource(root)

    def look() -> None:
        source.sample()
        done.set()

    threading.Thread(target=look, daemon=True).start()
    assert done.wait(NEVER)


def test_cooling_devices_are_not_counted_by_their_names(board):
    # 10 sorts before 2 as text.
    files = boards.coolers(*((f"cpufreq-cpu{n}", 48) for n in range(13)))
    source = SysfsSource(board({**boards.zones(("gpu-thermal", 50000)), **files}))
    for n in (2, 10):
        (board({}) / f"sys/class/thermal/cooling_device{n}/cur_state").write_text("3\n")
    assert source.sample()["reasons"] == ("cpufreq-cpu10", "cpufreq-cpu2")


def test_files_that_vanish_and_come_back(board, started, caplog):
    caplog.set_level("INFO", "jetrt")
    root = board(BOARDS["orin_jp72"])
    watched = started(root=root)
    assert watched.state().gpu_temp_c == 41.25
    (root / "sys/class").rename(root / "gone")
    until(lambda: watched.snapshot().gpu_temp_c is None)
    state = watched.state()
    assert (state.cpu_temp_c, state.gpu_temp_c, state.measured_clock_mhz) == (None, None, None)
    assert state.thermal_throttle_active is False
    with pytest.raises(TelemetryUnavailableError, match="Whether GPU 0 is throttled is unknown: sysfs: says nothing"):
        watched.require()
    (root / "gone").rename(root / "sys/class")
    until(lambda: watched.state().gpu_temp_c == 41.25)
    until(lambda: len(caplog.records) == 2)
    assert [(r.levelname, r.event) for r in caplog.records] == [
        ("WARNING", "telemetry_unavailable"),
        ("INFO", "telemetry_available"),
    ]


def test_files_that_come_and_go_while_they_are_read(board):
    root = board(BOARDS["thor_r39"])
    source = SysfsSource(root)
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for path in ("sys/class/thermal/thermal_zone1", "sys/class/hwmon/hwmon7", "sys/class/devfreq/gpu-gpc-0"):
                (root / path).rename(root / "away")
                (root / "away").rename(root / path)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(300):
            sample = source.sample()
            assert sample["gpu_temp_c"] in (None, 56.937)
            assert sample["gpu_clock_mhz"] in (None, 1574)
            assert sample["cpu_temp_c"] == 58.25
    finally:
        stop.set()
        mover.join()


# ------------------------------------------------------------------------------------------------ nothing to ask


def test_no_source_at_all(tmp_path, started, caplog):
    watched = started(root=tmp_path)
    state = watched.state()
    assert state == ThermalState(None, None, False, None, state.measured_at)
    with pytest.raises(TelemetryUnavailableError) as caught:
        watched.require()
    error = caught.value
    assert error.reason == "sysfs: says nothing about throttling; nvml: the package nvidia-ml-py is not installed"
    assert error.source == "sysfs, nvml"
    assert str(error) == (
        f"Whether GPU 0 is throttled is unknown: {error.reason}. "
        "A caller that steers by it goes on as if it were not, and says so once."
    )
    time.sleep(10 * INTERVAL)
    for _ in range(100):
        watched.state()
    (warning,) = caplog.records
    assert (warning.levelname, warning.event) == ("WARNING", "telemetry_unavailable")
    assert warning.getMessage() == (
        f"telemetry unavailable; whether GPU 0 is throttled is unknown and taken as no: {error.reason}"
    )


def test_logging_can_be_left_out(tmp_path, started, caplog):
    watched = started(root=tmp_path, log=False)
    assert watched.state().thermal_throttle_active is False
    time.sleep(5 * INTERVAL)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": -1}, r"device is -1; it must be the number of a GPU, 0 or above"),
        ({"device": True}, r"device is True"),
        ({"device": "cuda:0"}, r"device is 'cuda:0'"),
        ({"interval_s": 0}, r"interval_s is 0; allowed: 0.01 to 3600 seconds"),
        ({"interval_s": float("nan")}, r"interval_s is nan"),
        ({"interval_s": "1"}, r"interval_s is '1'"),
        ({"nvml": "yes"}, r"nvml is 'yes'; allowed: True, False, 'auto'"),
    ],
)
def test_senseless_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ThermalMonitor(**options)


def test_nvml_that_was_asked_for_by_name(monkeypatch, board, started):
    monkeypatch.setattr(polling, "find_spec", lambda name: None)
    with pytest.raises(
        TelemetryUnavailableError, match="the package nvidia-ml-py is not installed: pip install nvidia-ml-py"
    ) as caught:
        ThermalMonitor(nvml=True)
    assert caught.value.source == "nvml"


# ---------------------------------------------------------------------------------------------------- hung sources


class Scripted:
    """A source that says what it is told to, and hangs while it is told to."""

    def __init__(self, name: str = "sysfs", **sample: Any) -> None:
        self.name, self.says = name, sample
        self.hang, self.fail = threading.Event(), None
        self.go, self.hung, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.looks = 0

    def sample(self) -> Any:
        self.looks += 1
        if self.hang.is_set():
            self.hung.set()
            self.go.wait(60)
        if self.fail is not None:
            raise self.fail
        return dict(self.says)

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def hanging() -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(*arguments: Any, **options: Any) -> Scripted:
        made.append(Scripted(*arguments, **options))
        return made[-1]

    yield make
    for source in made:
        source.go.set()


def fastest(read: Callable[[], Any]) -> float:
    times = []
    for _ in range(200):
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_source_that_hangs(sources, started, hanging, caplog):
    caplog.set_level("INFO", "jetrt")
    source = hanging(gpu_temp_c=50.0, gpu_clock_mhz=1300, throttle_active=True)
    sources(source)
    watched = started()
    assert watched.require().thermal_throttle_active is True
    before = watched.state()
    source.hang.set()
    assert source.hung.wait(NEVER)
    threads = threading.active_count()
    until(lambda: watched.state().gpu_temp_c is None)
    # Known for three intervals after it was measured, and not before that is over.
    assert watched.state().measured_at - before.measured_at >= 3 * INTERVAL * 1e9
    state = watched.state()
    assert (state.thermal_throttle_active, state.measured_clock_mhz) == (False, None)
    (mute,) = watched.snapshot().unreadable
    assert mute.startswith("sysfs: no answer for ")
    with pytest.raises(TelemetryUnavailableError, match=r"is unknown: sysfs: no answer for \d+ s\."):
        watched.require()
    time.sleep(10 * INTERVAL)
    assert threading.active_count() == threads, "nobody is sent after it"
    assert [r.event for r in caplog.records] == ["thermal_throttle_entered", "telemetry_unavailable"]
    source.hang.clear()
    source.go.set()
    until(lambda: watched.state().gpu_temp_c == 50.0)
    until(lambda: len(caplog.records) == 3)
    assert caplog.records[2].event == "telemetry_available", "throttled before and after is no transition"


def test_a_source_that_hangs_takes_no_other_with_it(board, nvml, started, hanging, sources):
    stuck = hanging("nvml")
    stuck.hang.set()
    root = board(BOARDS["orin_nano_jp6"])
    sources(SysfsSource(root), stuck)
    watched = started(wait_s=0)
    assert stuck.hung.wait(NEVER)
    until(lambda: watched.state().gpu_temp_c == 47.5)
    (root / "sys/class/thermal/thermal_zone1/temp").write_text("61000\n")
    until(lambda: watched.state().gpu_temp_c == 61.0)
    cooler_of(root, "gpu-throttle-alert").write_text("1\n")
    until(lambda: watched.require().thermal_throttle_active)
    until(lambda: any(text.startswith("nvml: no answer for") for text in watched.snapshot().unreadable))


def test_a_source_that_hangs_from_the_start_delays_nobody(sources, hanging, started):
    stuck = hanging()
    stuck.hang.set()
    sources(stuck)
    begun = time.monotonic()
    watched = started(interval_s=3600, wait_s=0.05)
    assert time.monotonic() - begun < 10
    state = watched.state()
    assert state == ThermalState(None, None, False, None, state.measured_at)
    assert watched.snapshot().throttle_active is None
    with pytest.raises(TelemetryUnavailableError, match=r"nothing is measured yet|sysfs: has not answered yet"):
        watched.require()
    begun = time.monotonic()
    watched.close()
    assert time.monotonic() - begun < 10


def test_readers_while_a_source_hangs_and_threads_publish(sources, hanging, started):
    stuck, quick = hanging("nvml"), hanging("sysfs", gpu_temp_c=50.0, throttle_active=False)
    stuck.hang.set()
    sources(quick, stuck)
    watched = started(wait_s=0, interval_s=0.3)
    until(lambda: watched.state().gpu_temp_c)
    stop, trouble = threading.Event(), []

    def read() -> None:
        last = 0
        while not stop.is_set():
            state, reading = watched.state(), watched.snapshot()
            if not (state.gpu_temp_c == reading.gpu_temp_c == 50.0 and state.measured_at >= last):
                trouble.append((state, reading))
            last = state.measured_at

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not trouble


def test_a_look_that_fails_leaves_the_last_one_until_it_is_old(sources, started, hanging, caplog):
    source = hanging(gpu_temp_c=50.0, throttle_active=False)
    sources(source)
    watched = started()
    source.fail = OSError(5, "Input/output error")
    until(lambda: watched.snapshot().unreadable)
    assert watched.snapshot().unreadable == ("sysfs: OSError: [Errno 5] Input/output error",)
    until(lambda: watched.snapshot().gpu_temp_c is None)
    with pytest.raises(TelemetryUnavailableError, match=r"unknown: sysfs: OSError: \[Errno 5\]"):
        watched.require()
    source.fail = None
    until(lambda: watched.snapshot().gpu_temp_c == 50.0)
    assert watched.snapshot().unreadable == ()


def test_a_source_that_is_absent_for_good_is_not_asked_again(sources, started, hanging):
    gone, here = hanging("nvml"), hanging("sysfs", throttle_active=False)
    gone.fail = Absent("it is not installed", lasting=True)
    sources(here, gone)
    watched = started()
    until(lambda: here.looks > 5)
    assert gone.looks == 1
    assert gone.closed.wait(NEVER)
    assert watched.require().thermal_throttle_active is False


def test_a_source_that_may_come_up_is_looked_for_now_and_then(sources, started, hanging, monkeypatch):
    monkeypatch.setattr(polling, "LOOK_AGAIN_S", 5 * INTERVAL)
    late = hanging("nvml", gpu_temp_c=50.0, throttle_active=False)
    late.fail = Absent("the driver is not loaded")
    sources(late)
    watched = started()
    with pytest.raises(TelemetryUnavailableError, match="unknown: nvml: the driver is not loaded"):
        watched.require()
    late.fail = None
    until(lambda: watched.state().gpu_temp_c == 50.0)
    assert watched.require()


# ----------------------------------------------------------------------------------------------------------- NVML


def sampled(module: FakeNvml, nvml: Callable[[FakeNvml], None], device: int = 0) -> dict[str, Any]:
    nvml(module)
    return dict(NvmlSource(device).sample())


def test_nvml_of_a_card(nvml):
    assert known(sampled(FakeNvml(H200), nvml)) == {
        "discrete_gpu": True,
        "gpu_temp_c": 41.0,
        "gpu_clock_mhz": 1980,
        "gpu_clock_max_mhz": 1980,
        "memory_clock_mhz": 3201,
        "gpu_load": 0.37,
        "power_w": 121.937,
        "throttle_active": False,
        "power_throttle_active": False,
    }


@pytest.mark.parametrize(
    ("bits", "thermal_", "power", "reasons"),
    [
        (0x0, False, False, ()),
        (0x1, False, False, ()),
        (0x2, False, False, ("applications_clocks_setting",)),
        (0x4, False, True, ("sw_power_cap",)),
        (0x8, False, False, ("hw_slowdown",)),
        (0x20, True, False, ("sw_thermal_slowdown",)),
        (0x48, True, False, ("hw_slowdown", "hw_thermal_slowdown")),
        (0x88, False, True, ("hw_slowdown", "hw_power_brake_slowdown")),
        (0x64, True, True, ("sw_power_cap", "sw_thermal_slowdown", "hw_thermal_slowdown")),
        (0x100, False, False, ("display_clock_setting",)),
        (1 << 63, None, None, ()),
        (-1, None, None, ()),
        (Code(boards.NOT_SUPPORTED), None, None, ()),
    ],
)
def test_reasons(bits, thermal_, power, reasons, nvml):
    sample = sampled(FakeNvml({**H200, "nvmlDeviceGetCurrentClocksEventReasons": bits}), nvml)
    assert (sample["throttle_active"], sample["power_throttle_active"], sample["reasons"]) == (
        thermal_,
        power,
        reasons,
    )


def test_older_and_newer_names_of_functions(nvml):
    older = {k: v for k, v in H200.items() if k != "nvmlDeviceGetCurrentClocksEventReasons"}
    older["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x40
    # An old pynvml, and a new one on an old driver.
    for missing, answer in (
        (("nvmlDeviceGetCurrentClocksEventReasons",), {}),
        ((), {"nvmlDeviceGetCurrentClocksEventReasons": Code(boards.FUNCTION_NOT_FOUND)}),
    ):
        sample = sampled(FakeNvml({**older, **answer}, missing=missing), nvml)
        assert (sample["throttle_active"], sample["unreadable"]) == (True, ())
    newer = {**H200, "nvmlDeviceGetTemperature": Code(boards.FUNCTION_NOT_FOUND), "nvmlDeviceGetTemperatureV": 43}
    assert sampled(FakeNvml(newer), nvml)["gpu_temp_c"] == 43.0
    assert sampled(FakeNvml(newer, missing=("nvmlDeviceGetTemperature",)), nvml)["gpu_temp_c"] == 43.0


@pytest.mark.parametrize("function", list(H200))
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Code(boards.NOT_SUPPORTED), False),
        (Code(boards.FUNCTION_NOT_FOUND), False),
        (Code(boards.NO_PERMISSION), True),
        (Code(boards.UNKNOWN), True),
        ("garbage", True),
        (-7, True),
        (4294967040, True),
        (float("nan"), True),
    ],
)
def test_one_answer_goes_wrong_and_the_others_stay(function, answer, told, nvml):
    good = sampled(FakeNvml(H200), nvml)
    given_: Any = answer
    if function.endswith("UtilizationRates") and not isinstance(answer, Code):
        given_ = object() if answer == "garbage" else types.SimpleNamespace(gpu=answer)
    sample = sampled(FakeNvml({**H200, function: given_}), nvml)
    lost = {k for k in good if good[k] != sample[k]} - {"unreadable"}
    by_function = {
        "nvmlDeviceGetTemperature": {"gpu_temp_c"},
        "nvmlDeviceGetClockInfo": {"gpu_clock_mhz", "memory_clock_mhz"},
        "nvmlDeviceGetMaxClockInfo": {"gpu_clock_max_mhz"},
        "nvmlDeviceGetPowerUsage": {"power_w"},
        "nvmlDeviceGetUtilizationRates": {"gpu_load"},
        "nvmlDeviceGetCurrentClocksEventReasons": {"throttle_active", "power_throttle_active"},
    }
    if function == "nvmlDeviceGetTemperature" and answer == -7:
        assert (sample["gpu_temp_c"], sample["unreadable"]) == (-7.0, ()), "outdoors in winter"
        return
    assert lost == by_function[function]
    assert all(sample[name] is None for name in lost)
    assert bool(sample["unreadable"]) == told


def test_zeros_of_an_unsupported_sensor_are_unknown(nvml):
    zeros = dict.fromkeys(H200, 0) | {
        "nvmlDeviceGetClockInfo": lambda gpu, kind: 0,
        "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: 0,
        "nvmlDeviceGetUtilizationRates": type("Rates", (), {"gpu": 0})(),
    }
    sample = sampled(FakeNvml(zeros), nvml)
    assert [sample[k] for k in ("gpu_temp_c", "gpu_clock_mhz", "gpu_clock_max_mhz", "power_w")] == [None] * 4
    assert sample["gpu_load"] == 0.0, "idle"


@pytest.mark.parametrize(
    ("module", "reason", "lasting"),
    [
        (None, "the package nvidia-ml-py is not installed", True),
        (FakeNvml({"nvmlInit": Code(boards.LIBRARY_NOT_FOUND)}), "there is no libnvidia-ml.so.1", False),
        (FakeNvml({"nvmlInit": Code(boards.DRIVER_NOT_LOADED)}), "nvmlInit: NVML error 9", False),
        (boards.ORIN_NVML, r"NVML measures nothing on Orin \(nvgpu\)", True),
        (FakeNvml(H200, names=()), "NVML has 0 GPUs, and no number 0", False),
    ],
)
def test_nvml_that_is_not_to_be_had(module, reason, lasting, nvml):
    nvml(module)
    with pytest.raises(Absent, match=f"^{reason}$") as caught:
        NvmlSource(0).sample()
    assert caught.value.lasting == lasting


def test_a_package_that_is_broken(nvml, monkeypatch, tmp_path):
    (tmp_path / "pynvml.py").write_text("from ctypes import no_such_thing")
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match=r"^pynvml cannot be imported: cannot import name 'no_such_thing'"):
        NvmlSource(0).sample()


def test_a_gpu_that_is_lost_is_opened_again(nvml):
    module = FakeNvml(H200)
    nvml(module)
    source = NvmlSource(0)
    source.sample()
    module.answers["nvmlDeviceGetPowerUsage"] = Code(boards.GPU_IS_LOST)
    with pytest.raises(FakeNvml.NVMLError, match="NVML error 15"):
        source.sample()
    module.answers = dict(H200)
    assert source.sample()["power_w"] == 121.937
    assert module.calls.count("nvmlInit") == 2
    source.close()
    assert module.calls[-1] == "nvmlShutdown"


TWO = ("NVIDIA H200", "NVIDIA H200")
DIFFERENT = ("NVIDIA T400", "NVIDIA H200")


@pytest.mark.parametrize(
    ("names", "device", "environment", "expected"),
    [
        (TWO, 0, {}, 0),
        (TWO, 1, {}, 1),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": "1"}, 1),
        (TWO, 1, {"CUDA_VISIBLE_DEVICES": "1, 0"}, 0),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": "GPU-1111-abcd"}, 1),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": "GPU-11"}, 1),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": "MIG-1-2-3"}, 1),
        (DIFFERENT, 1, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1),
        (DIFFERENT, 0, {"CUDA_VISIBLE_DEVICES": "GPU-1"}, 1),
        (DIFFERENT, 0, {}, "which of 2 different GPUs CUDA counts as 0 is not known; set CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        (TWO, 2, {}, "NVML has 2 GPUs, and no number 2"),
        (TWO, 1, {"CUDA_VISIBLE_DEVICES": "1"}, "CUDA_VISIBLE_DEVICES='1' has no device 1"),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' has no device 0"),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": "GPU-"}, "NVML knows 2 GPUs by 'GPU-'"),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": "GPU-9"}, "NVML knows 0 GPUs by 'GPU-9'"),
        (TWO, 0, {"CUDA_VISIBLE_DEVICES": "-1"}, "NVML knows 0 GPUs by '-1'"),
    ],
)
def test_the_gpu_is_the_one_that_cuda_means(names, device, environment, expected, nvml, monkeypatch):
    module = FakeNvml({"nvmlDeviceGetTemperature": lambda gpu, sensor: 40 + gpu}, names)
    nvml(module)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(Absent, match=expected):
            NvmlSource(device).sample()
    else:
        assert NvmlSource(device).sample()["gpu_temp_c"] == 40.0 + expected


# -------------------------------------------------------------------------------------------------------- together

OPTIONAL_FLAG = st.sampled_from([None, False, True])
SAMPLES = st.fixed_dictionaries(
    {
        "cpu_temp_c": st.none() | st.floats(-40, 150),
        "gpu_temp_c": st.none() | st.floats(-40, 150),
        "gpu_clock_mhz": st.none() | st.integers(1, 20_000),
        "gpu_load": st.none() | st.floats(0, 1),
        "throttle_active": OPTIONAL_FLAG,
        "power_throttle_active": OPTIONAL_FLAG,
        "discrete_gpu": st.booleans(),
        "reasons": st.lists(st.sampled_from("abc")).map(tuple),
        "unreadable": st.lists(st.sampled_from("xyz")).map(tuple),
    }
)


@given(samples=st.lists(SAMPLES, max_size=3))
def test_merging(samples):
    named = {f"s{n}": sample for n, sample in enumerate(samples)}
    reading = merge(named, silent=("mute",), measured_at=7)
    card = any(sample["discrete_gpu"] for sample in samples)
    for key in ("cpu_temp_c", "gpu_temp_c", "gpu_clock_mhz", "gpu_load"):
        counts = [s for s in samples if key == "cpu_temp_c" or s["discrete_gpu"] or not card]
        assert getattr(reading, key) == next((s[key] for s in counts if s[key] is not None), None)
        assert (key in reading.source) == (getattr(reading, key) is not None)
    for key in ("throttle_active", "power_throttle_active"):
        said = [s[key] for s in samples]
        no = any(s[key] is False and (s["discrete_gpu"] or not card) for s in samples)
        assert getattr(reading, key) == (True if True in said else False if no else None)
    assert set(reading.reasons) == {r for s in samples for r in s["reasons"]}
    assert reading.unreadable[-1] == "mute"
    assert reading.measured_at == 7
    assert state_of(reading).thermal_throttle_active == (reading.throttle_active is True)


def test_records_can_be_pickled_and_copied(board, started):
    reading = started(root=board(BOARDS["orin_nano_jp6"])).snapshot()
    assert pickle.loads(pickle.dumps(reading)) == reading
    assert dataclasses.asdict(reading)["rails_w"] == reading.rails_w
    with pytest.raises(dataclasses.FrozenInstanceError):
        reading.gpu_temp_c = 0.0


# ---------------------------------------------------------------------------------------------------- lives and ends


_others: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def threads_of_others():
    """The monitor that a process shares may have been started by any test before."""
    _others.clear()
    _others.update(named_threads())
    yield
    _others.clear()


def named_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("jetrt-") and t not in _others]


def test_closing(sources, hanging, started):
    source = hanging(gpu_temp_c=50.0, throttle_active=False)
    sources(source)
    with started() as watched:
        assert len(named_threads()) == 2
        assert all(thread.daemon for thread in named_threads())
        assert not watched.closed
    assert watched.closed
    watched.close()
    until(lambda: not named_threads())
    assert source.closed.is_set()
    assert watched.state().gpu_temp_c is None
    with pytest.raises(TelemetryUnavailableError, match="the monitor is closed"):
        watched.require()


def test_dropping_is_closing(sources, hanging):
    source = hanging(throttle_active=False)
    sources(source)
    watched = ThermalMonitor(interval_s=INTERVAL)
    assert named_threads()
    del watched
    gc.collect()
    until(lambda: not named_threads())
    assert source.closed.is_set()


def test_a_monitor_whose_threads_died_says_so_once(sources, hanging, started, caplog):
    sources(hanging(gpu_temp_c=50.0, throttle_active=False))
    watched = started()
    watched._poller.stop()  # as if the publishing thread were starved
    until(lambda: watched.state().gpu_temp_c is None)
    for _ in range(10):
        assert watched.state().thermal_throttle_active is False
    until(lambda: caplog.records)
    time.sleep(5 * INTERVAL)
    (warning,) = caplog.records
    assert warning.event == "telemetry_unavailable"
    assert "nothing was published for 0.3 s" in warning.getMessage()


def test_one_monitor_is_shared(monkeypatch, nvml):
    monkeypatch.setattr(polling, "_shared", {})
    found: list[ThermalMonitor] = []
    threads = [threading.Thread(target=lambda: found.append(thermal.monitor())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert thermal.monitor(0) is found[0]
    assert thermal.monitor(1) is not found[0]
    found[0].close()
    again = thermal.monitor()
    assert again is not found[0]
    assert not again.closed
    again.close()
    thermal.monitor(1).close()
    with pytest.raises(ValueError, match="device is -1"):
        thermal.monitor(-1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("locked", [False, True])
def test_a_forked_child_measures_for_itself(locked, board, started):
    root = board(BOARDS["orin_nano_jp6"])
    watched = started(root=root)
    assert watched.state().gpu_temp_c == 47.5
    if locked:
        watched._lock.acquire()  # by a thread that the child does not have
        polling._shared_lock.acquire()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert watched.state().gpu_temp_c is None, "the parent's"
            until(lambda: watched.state().gpu_temp_c == 47.5)
            watched.require()
            watched.close()
            thermal.monitor().close()
            code = 0
        finally:
            os._exit(code)
    if locked:
        watched._lock.release()
        polling._shared_lock.release()
    assert os.waitpid(child, 0)[1] == 0
    assert watched.state().gpu_temp_c == 47.5, "the parent goes on"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("end", ["", "sys.exit()", "del m", "m.close()", "m.interval = m"])
def test_the_interpreter_ends_cleanly(end, board):
    done = python(f"""
import sys
from jetrt import thermal
m = thermal.ThermalMonitor(root={str(board(BOARDS["thor_r39"]))!r}, interval_s=0.01, nvml=False)
print(m.require().gpu_temp_c)
{end}
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "56.937\n", "")


def test_the_interpreter_ends_although_a_source_hangs():
    done = python("""
import time
from jetrt import thermal
class Stuck:
    name = "stuck"
    def sample(self):
        time.sleep(1000)
    def close(self):
        pass
thermal.ThermalMonitor._sources = lambda self: [Stuck()]
m = thermal.ThermalMonitor(interval_s=0.01, wait_s=0, log=False)
print(m.state().thermal_throttle_active)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_nothing_is_imported_or_started_before_it_is_asked_for():
    done = python("""
import sys, threading, jetrt, jetrt.runtime
print("jetrt.thermal" in sys.modules, threading.active_count())
import jetrt.thermal
print("pynvml" in sys.modules, threading.active_count())
""")
    assert done.stdout == "False 1\nFalse 1\n"


def test_transitions_are_written_by_json_logs_at_any_level(board, started):
    root = board(BOARDS["orin_nano_jp6"])
    cooler_of(root, "gpu-throttle-alert").write_text("1\n")
    stream = io.StringIO()
    with configure_json_logging(stream, "CRITICAL"):
        watched = started(root=root)
        assert watched.require().thermal_throttle_active
        until(lambda: "\n" in stream.getvalue())
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert (line["level"], line["event"]) == ("WARNING", "thermal_throttle_entered")
    assert line["message"] == "thermal throttle active; gpu_temp=48C; clock=612mhz; reasons=gpu-throttle-alert"
    assert line["fields"]["power_w"] == pytest.approx(5.761792)
    assert line["fields"]["measured_at"] > 0


def test_a_handler_that_raises_stops_nothing(board, started, monkeypatch):
    class Bad(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("no room")

    logger, bad = logging.getLogger("jetrt.thermal"), Bad()
    logger.addHandler(bad)
    try:
        root = board(BOARDS["orin_nano_jp6"])
        watched = started(root=root)
        cooler_of(root, "gpu-throttle-alert").write_text("1\n")
        until(lambda: watched.state().thermal_throttle_active)
        cooler_of(root, "gpu-throttle-alert").write_text("0\n")
        until(lambda: not watched.state().thermal_throttle_active)
    finally:
        logger.removeHandler(bad)


def test_a_handler_that_hangs_holds_up_no_reader(board, started):
    go, held = threading.Event(), threading.Event()

    class Stuck(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            held.set()
            go.wait(60)

    logger, stuck = logging.getLogger("jetrt.thermal"), Stuck()
    logger.addHandler(stuck)
    try:
        root = board(BOARDS["orin_nano_jp6"])
        cooler_of(root, "gpu-throttle-alert").write_text("1\n")
        watched = started(root=root)
        assert held.wait(NEVER)
        # The publishing thread is held up, so that what it published grows old; readers go on, their warning too waits.
        until(lambda: watched.state().gpu_temp_c is None)
        begun = time.monotonic()
        for _ in range(1000):
            assert watched.state().thermal_throttle_active is False
        assert time.monotonic() - begun < NEVER
        with pytest.raises(TelemetryUnavailableError, match="nothing was published for"):
            watched.require()
    finally:
        go.set()
        logger.removeHandler(stuck)
    until(lambda: watched.state().gpu_temp_c == 47.5)


PAGE = (Path(__file__).parent.parent / "docs/runtimes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("heading", ["Temperature, clocks and throttling", "Logs"])
def test_what_the_page_shows_runs(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    done = python(code)
    assert done.returncode == 0, done.stderr
    if heading == "Logs":
        (shown,) = re.findall(r"```json\n(.*?)```", section, re.S)
        written = json.loads(done.stderr)
        assert list(json.loads(shown)) == list(written)
        assert (written["event"], written["fields"]) == ("ready", {"engines": ["dit@fp16"]})


def test_values_and_events_of_the_page_exist():
    section = PAGE.split("## Temperature, clocks and throttling\n")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == {field.name for field in dataclasses.fields(Reading)} - {"source", "unreadable", "measured_at"}
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(polling.__file__).parent.glob("*.py"))
    for name in ("thermal_throttle_", "power_throttle_", "telemetry_unavailable", "telemetry_available"):
        assert f'"{name}' in sources
        assert name in PAGE
