"""Files and NVML answers of boards, as their owners recorded them: what jetrt.thermal reads of each.

Names, order and numbering follow the recordings; values are plausible where none was recorded. EAGAIN stands for a file
that answers every read with it, as a power-gated sensor does. The identity of boards is in test_platform.py.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EAGAIN = object()

Files = Mapping[str, Any]


def zones(*pairs: tuple[str, Any]) -> Files:
    found: dict[str, Any] = {}
    for number, (kind, milli) in enumerate(pairs):
        at = f"sys/class/thermal/thermal_zone{number}"
        found |= {f"{at}/type": f"{kind}\n", f"{at}/temp": milli if milli is EAGAIN else f"{milli}\n"}
        found |= {f"{at}/trip_point_0_temp": "99000\n", f"{at}/trip_point_0_type": "passive\n"}
    return found


def coolers(*kinds: tuple[str, int]) -> Files:
    found = {}
    for number, (kind, most) in enumerate(kinds):
        at = f"sys/class/thermal/cooling_device{number}"
        found |= {f"{at}/type": f"{kind}\n", f"{at}/cur_state": "0\n", f"{at}/max_state": f"{most}\n"}
    return found


def alerts(*names: str) -> tuple[tuple[str, int], ...]:
    return tuple((f"{name}-throttle-alert", 2) for name in names)


def hwmon(number: int, name: str, **files: Any) -> Files:
    at = f"sys/class/hwmon/hwmon{number}"
    return {f"{at}/name": f"{name}\n", **{f"{at}/{file}": f"{text}\n" for file, text in files.items()}}


def ina3221(number: int, **rails: tuple[int, int]) -> Files:
    files: dict[str, Any] = {"in7_label": "sum of shunt voltages", "in4_input": 1}
    for n, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        name = "NC" if label.startswith("NC") else label
        files |= {f"in{n}_label": name, f"in{n}_input": millivolts, f"curr{n}_input": milliamperes}
        files |= {f"curr{n}_max": 32000, f"curr{n}_crit": 32000}
    return hwmon(number, "ina3221", **files)


def overcurrent(number: int, **counts: int) -> Files:
    counts = {"oc1": 0, "oc2": 0, "oc3": 0, **counts}
    files = {f"{n}_event_cnt": count for n, count in counts.items()} | {f"{n}_throt_en": 1 for n in counts}
    return hwmon(number, "soctherm_oc", **files)


def devfreq(name: str, now: int, most: int, load: int | None = None) -> Files:
    at = f"sys/class/devfreq/{name}"
    files = {f"{at}/cur_freq": f"{now}\n", f"{at}/min_freq": "306000000\n", f"{at}/max_freq": f"{most}\n"}
    return files if load is None else {**files, f"{at}/device/load": f"{load}\n"}


def power_mode(number: int, *names: str) -> Files:
    table = "".join(f"< POWER_MODEL ID={n} NAME={name} >\n" for n, name in enumerate(names))
    return {"var/lib/nvpmodel/status": f"pmode:{number:04}\n", "etc/nvpmodel.conf": table}


def lay_out(root: Path, files: Files) -> list[int]:
    """Writes the files below `root`; returns descriptors to be closed, which make named pipes answer EAGAIN."""
    held = []
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is EAGAIN:
            # A pipe that somebody has open for writing and has not written to.
            os.mkfifo(path)
            held.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        else:
            path.write_text(text)
    return held


# ------------------------------------------------------------------------------------------------------------ boards

ORIN_ALERTS = alerts("cpu", "gpu", "cv0", "cv1", "cv2", "soc0", "soc1", "soc2")

#: Orin Nano 8 GB Super, JetPack 6: its CV zones never answer, and the monitors come up in any order.
ORIN_NANO_JP6: Files = {
    **zones(
        ("cpu-thermal", 48062),
        ("gpu-thermal", 47500),
        ("cv0-thermal", EAGAIN),
        ("cv1-thermal", EAGAIN),
        ("cv2-thermal", EAGAIN),
        ("soc0-thermal", 46687),
        ("soc1-thermal", 47125),
        ("soc2-thermal", 46250),
        ("tj-thermal", 48062),
    ),
    **coolers(
        ("cpufreq-cpu0", 28),
        ("cpufreq-cpu4", 28),
        ("devfreq-17000000.gpu", 10),
        *ORIN_ALERTS,
        ("hot-surface-alert", 2),
        ("pwm-fan", 4),
    ),
    **hwmon(0, "pwmfan", pwm1=71),
    **ina3221(1, VDD_IN=(5072, 1136), VDD_CPU_GPU_CV=(5064, 208), VDD_SOC=(5064, 360)),
    **hwmon(2, "pwm_tach", rpm=1830),
    **overcurrent(3),
    **devfreq("17000000.gpu", 612000000, 1020000000, load=423),
    **power_mode(2, "15W", "25W", "MAXN_SUPER"),
    # Of no interest to anybody who does not want to wait.
    "sys/devices/platform/gpu-throttle-alert/thermal_trip_event_block": EAGAIN,
}

#: AGX Orin, JetPack 5: names of kernel 5.10, two power monitors and no total, GPU gated at idle.
ORIN_AGX_JP5: Files = {
    **zones(
        ("CPU-therm", 42593),
        ("GPU-therm", EAGAIN),
        ("CV0-therm", EAGAIN),
        ("CV1-therm", EAGAIN),
        ("CV2-therm", EAGAIN),
        ("SOC0-therm", 39375),
        ("SOC1-therm", 40468),
        ("SOC2-therm", 39343),
        ("tj-therm", 42593),
        ("Tboard_tegra", 32000),
        ("Tdiode_tegra", 33250),
    ),
    **coolers(
        ("thermal-cpufreq-0", 25),
        ("thermal-cpufreq-1", 25),
        ("thermal-cpufreq-2", 25),
        ("thermal-devfreq-0", 6),
        *ORIN_ALERTS,
        ("hot-surface-alert", 2),
        ("pwm-fan", 4),
    ),
    **ina3221(2, VDD_GPU_SOC=(19960, 120), VDD_CPU_CV=(19960, 20), VIN_SYS_5V0=(5040, 800)),
    **ina3221(4, NC1=(0, 0), VDDQ_VDD2_1V8AO=(5064, 60), NC2=(0, 0)),
    **overcurrent(5),
    **devfreq("17000000.ga10b", 0, 1300500000, load=0),
    **power_mode(0, "MAXN", "MODE_15W"),
}

#: AGX Orin, JetPack 7.2: as on 6.
ORIN_JP72: Files = {
    **zones(("cpu-thermal", 42312), ("gpu-thermal", 41250), ("soc2-thermal", 40500), ("tj-thermal", 43000)),
    **coolers(
        ("cpufreq-cpu0", 28),
        ("cpufreq-cpu4", 28),
        ("cpufreq-cpu8", 28),
        ("devfreq-17000000.gpu", 10),
        *ORIN_ALERTS,
        ("hot-surface-alert", 2),
    ),
    **ina3221(0, VDD_GPU_SOC=(20000, 156), VDD_CPU_CV=(20000, 72), VIN_SYS_5V0=(5032, 571)),
    **overcurrent(1),
    **devfreq("17000000.gpu", 612000000, 1300500000, load=180),
    **power_mode(0, "MAXN", "MODE_15W", "MODE_30W", "MODE_50W"),
}

THOR_COOLERS = coolers(
    *((f"cpufreq-cpu{n}", 48) for n in range(13)),
    ("devfreq-gpu-gpc-0", 169),
    ("devfreq-gpu-nvd-0", 182),
    *alerts("cpu", "gpu", "soc012", "soc345"),
    ("pwm-fan", 4),
)

#: AGX Thor, L4T 38: the GPU's zone answers nothing while it is idle; clocks without a load; rails around zero.
THOR_R38: Files = {
    **zones(
        ("cpu-thermal", 49750),
        ("gpu-thermal", EAGAIN),
        ("soc012-thermal", 48500),
        ("soc345-thermal", 48750),
        ("tj-thermal", 51218),
    ),
    **THOR_COOLERS,
    **ina3221(3, VDD_GPU=(20000, -20), VDD_CPU_SOC_MSS=(20000, 300), VIN_SYS_5V0=(5000, 1100)),
    **hwmon(4, "ina238", in1_input=20000, curr1_input=1445, power1_input=28906000),
    **hwmon(5, "tmp451", temp1_input=44000),
    **devfreq("gpu-gpc-0", 0, 1575000000),
    **devfreq("gpu-nvd-0", 1691000000, 1692000000),
    **devfreq("bwmgr", 4266000000, 4266000000),
    **power_mode(1, "MAXN", "120W", "90W", "70W"),
}

#: The same with L4T 39, at work. One over-current event at boot; no monitor for it existed before.
THOR_R39: Files = {
    **zones(
        ("cpu-thermal", 58250),
        ("gpu-thermal", 56937),
        ("soc012-thermal", 55375),
        ("soc345-thermal", 55812),
        ("tj-thermal", 66625),
    ),
    **THOR_COOLERS,
    **ina3221(7, VDD_GPU=(20000, 1897), VDD_CPU_SOC_MSS=(20000, 1503), VIN_SYS_5V0=(5000, 3097)),
    **hwmon(2, "ina238", in1_input=20000, curr1_input=6224),
    **overcurrent(9, oc3=1),
    **devfreq("gpu-gpc-0", 1574000000, 1575000000),
    **devfreq("gpu-nvd-0", 1691000000, 1692000000),
    **devfreq("bwmgr", 4266000000, 4266000000),
    **power_mode(0, "MAXN", "120W", "90W", "70W"),
}

#: DGX Spark: the firmware's zones, the GPU through NVML alone.
SPARK: Files = {
    "sys/class/dmi/id/product_name": "NVIDIA_DGX_Spark\n",
    **zones(("acpitz", 44300), ("acpitz", 46500), ("acpitz", 45100)),
    **coolers(("Processor", 3), ("Processor", 3)),
}

#: A workstation with a card: the firmware's zone tells nothing, the processor's package does.
X86: Files = {
    "sys/class/dmi/id/product_name": "ThinkStation P620\n",
    **zones(("acpitz", 27800), ("x86_pkg_temp", 61000)),
    **coolers(("Processor", 10), ("intel_powerclamp", 50)),
    **hwmon(1, "coretemp", temp1_label="Package id 0", temp1_input=61000, temp2_label="Core 0", temp2_input=58000),
    **hwmon(2, "nvme", temp1_input=38850),
}

BOARDS = {
    "orin_nano_jp6": ORIN_NANO_JP6,
    "orin_agx_jp5": ORIN_AGX_JP5,
    "orin_jp72": ORIN_JP72,
    "thor_r38": THOR_R38,
    "thor_r39": THOR_R39,
    "spark": SPARK,
    "x86": X86,
}


# -------------------------------------------------------------------------------------------------------------- NVML

NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 3, 4, 9, 12
FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 13, 15, 999

MEASURED = (
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
)


class FakeNvml(types.ModuleType):
    """A stand-in for `pynvml`. `answers`: function -> what it returns, or the code of the error that it raises as
    `Code`, or something to call with its arguments; what is not named is not supported. `missing`: functions that an
    older pynvml does not have."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"NVML error {value}")
            self.value = value

    def __init__(
        self, answers: Mapping[str, Any], names: tuple[str, ...] = ("NVIDIA H200",), missing: tuple[str, ...] = ()
    ) -> None:
        super().__init__("pynvml")
        self.answers, self.names = dict(answers), names
        self.calls: list[str] = []
        for function in MEASURED:
            if function not in missing:
                setattr(self, function, self._measuring(function))

    def _measuring(self, function: str) -> Any:
        def call(gpu: int, *arguments: Any) -> Any:
            self.calls.append(function)
            answer = self.answers.get(function, Code(NOT_SUPPORTED))
            if isinstance(answer, Code):
                raise self.NVMLError(answer.number)
            return answer(gpu, *arguments) if callable(answer) else answer

        return call

    def nvmlInit(self) -> None:
        self.calls.append("nvmlInit")
        code = self.answers.get("nvmlInit")
        if code is not None:
            raise self.NVMLError(code.number)

    def nvmlShutdown(self) -> None:
        self.calls.append("nvmlShutdown")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.names):
            raise self.NVMLError(2)
        return index

    def nvmlDeviceGetName(self, gpu: int) -> bytes:
        return self.names[gpu].encode()  # as older ones

    def nvmlDeviceGetUUID(self, gpu: int) -> str:
        return f"GPU-{gpu}{gpu}{gpu}{gpu}-abcd"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance: str) -> int:
        return int(instance.split("-")[1])


class Code:
    def __init__(self, number: int) -> None:
        self.number = number


def _clocks(sm: int, memory: int) -> Any:
    return lambda gpu, kind: {FakeNvml.NVML_CLOCK_SM: sm, FakeNvml.NVML_CLOCK_MEM: memory}[kind]


H200: Mapping[str, Any] = {
    "nvmlDeviceGetTemperature": 41,
    "nvmlDeviceGetClockInfo": _clocks(1980, 3201),
    "nvmlDeviceGetMaxClockInfo": _clocks(1980, 3201),
    "nvmlDeviceGetPowerUsage": 121_937,
    "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=37, memory=4),
    "nvmlDeviceGetCurrentClocksEventReasons": 0,
}
#: JetPack 6 and 7 on Orin; some releases report success with zeros and garbage.
ORIN_NVML = FakeNvml({}, ("Orin (nvgpu)",))
ORIN_GARBAGE = FakeNvml(
    {**H200, "nvmlDeviceGetTemperature": 4294967040, "nvmlDeviceGetCurrentClocksEventReasons": 0x20}, ("Orin (nvgpu)",)
)
THOR_R38_NVML = FakeNvml({"nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=87, memory=0)}, ("NVIDIA Thor",))
THOR_R39_NVML = FakeNvml(
    {
        "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=87, memory=0),
        "nvmlDeviceGetTemperature": 57,
        "nvmlDeviceGetPowerUsage": 1000,
    },
    ("NVIDIA Thor",),
)
SPARK_NVML = FakeNvml(
    {
        "nvmlDeviceGetTemperature": 52,
        "nvmlDeviceGetPowerUsage": 31_250,
        "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=96, memory=0),
        "nvmlDeviceGetClockInfo": _clocks(2418, 0),
        "nvmlDeviceGetMaxClockInfo": _clocks(3003, 0),
        "nvmlDeviceGetCurrentClocksEventReasons": 0,
    },
    ("NVIDIA GB10",),
)
