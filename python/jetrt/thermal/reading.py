"""What is known of the machine at one moment, put together from the sources that answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..runtime import ThermalState

__all__ = ["Absent", "Reading", "Sample", "Source", "merge", "state_of"]

#: Values by the names of `Reading`; ``None`` or absent is unknown. Beside them "discrete_gpu": True when the GPU that
#: the source speaks of is a card beside the processor.
Sample = Mapping[str, Any]


class Absent(Exception):  # noqa: N818 - not an error: many machines lack a source
    """The source does not exist here, for the reason given; `lasting` when it will not come up later either."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Source(Protocol):
    """Something to ask. Always called on the same thread, and may take as long as it takes."""

    @property
    def name(self) -> str: ...
    def sample(self) -> Sample:
        """Raises `Absent`, or anything else when this one look failed."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Reading:
    """All that is known; ``None`` is unknown, never zero. Temperatures in °C, clocks in MHz, power in W."""

    cpu_temp_c: float | None = None
    gpu_temp_c: float | None = None
    #: Whether heat holds clocks down: a cooling device of the kernel is at work, or NVML reports a thermal slowdown.
    throttle_active: bool | None = None
    #: Whether power does: over-current events since the last look (Jetson), or a power cap or brake (NVML).
    power_throttle_active: bool | None = None
    #: What holds clocks down, by the names of the kernel's cooling devices and counters and of NVML's reasons.
    reasons: tuple[str, ...] = ()
    gpu_clock_mhz: int | None = None
    #: The highest that the power mode (Jetson) or the model (NVML) allows.
    gpu_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    #: 0 to 1.
    gpu_load: float | None = None
    #: Of the whole module (Jetson, where it is measured) or of the card (NVML).
    power_w: float | None = None
    #: nvpmodel's mode, such as "MAXN_SUPER".
    power_mode: str | None = None
    #: Where each value is from, such as ``{"gpu_temp_c": "sysfs: gpu-thermal"}``.
    source: Mapping[str, str] = field(default_factory=dict)
    #: What is there and does not answer, or not with anything that can be.
    unreadable: tuple[str, ...] = ()
    #: `time.monotonic_ns()` of the oldest measurement in it; of the attempt when there is none.
    measured_at: int = 0
    #: Power of each measured rail by its label.
    rails_w: Mapping[str, float] = field(default_factory=dict)
    #: Events since boot by counter. On some boards a single one, at boot, holds clocks down for good.
    over_current_events: Mapping[str, int] = field(default_factory=dict)


OF_THE_GPU = ("gpu_temp_c", "gpu_clock_mhz", "gpu_clock_max_mhz", "memory_clock_mhz", "gpu_load", "power_w")
_ANY = ("cpu_temp_c", *OF_THE_GPU, "power_mode")
_FLAGS = ("throttle_active", "power_throttle_active")


def merge(samples: Mapping[str, Sample], *, silent: tuple[str, ...] = (), measured_at: int) -> Reading:
    """One reading of several sources, the most trusted first. `silent` names those that stopped to answer.

    Where a card beside the processor is the GPU in question, what others say of the processor's own GPU is left out.
    """
    card = any(sample.get("discrete_gpu") for sample in samples.values())
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, sample in samples.items():
        other_gpu = card and not sample.get("discrete_gpu")

        def take(key: str, name: str = name, sample: Sample = sample) -> None:
            values[key] = sample[key]
            where = sample.get("source", {}).get(key)
            origin[key] = f"{name}: {where}" if where else name

        for key in _ANY:
            if sample.get(key) is not None and key not in values and not (other_gpu and key in OF_THE_GPU):
                take(key)
        for key in _FLAGS:
            # One that is throttled is enough; one that is not says nothing of another GPU.
            found = sample.get(key)
            if (found and not values.get(key)) or (found is False and key not in values and not other_gpu):
                take(key)

    def joined(key: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for sample in samples.values() for text in sample.get(key, ())))

    def by_name(key: str) -> Mapping[str, Any]:
        return {k: v for sample in samples.values() for k, v in sample.get(key, {}).items()}

    return Reading(
        **values,
        reasons=joined("reasons"),
        source=origin,
        unreadable=joined("unreadable") + silent,
        measured_at=measured_at,
        rails_w=by_name("rails_w"),
        over_current_events=by_name("over_current_events"),
    )


def state_of(reading: Reading) -> ThermalState:
    """The short form, in which an unknown throttle state is False."""
    return ThermalState(
        cpu_temp_c=reading.cpu_temp_c,
        gpu_temp_c=reading.gpu_temp_c,
        thermal_throttle_active=reading.throttle_active is True,
        measured_clock_mhz=reading.gpu_clock_mhz,
        measured_at=reading.measured_at,
    )
