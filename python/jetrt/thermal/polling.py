"""The threads that measure, and what is read of them.

    sources, a thread each -> the newest sample of each -> one publishing thread -> a cell that any thread reads

A source that hangs holds up its own thread alone. The publishing thread never asks a sensor: it sees that a sample grew
old, and says so once. After a fork the child's first reader starts threads of the child's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Final, Literal, NamedTuple

from .._core import _Latest
from ..errors import TelemetryUnavailableError
from ..runtime import ThermalState
from .nvml import PACKAGE, NvmlSource
from .reading import Absent, Reading, Sample, Source, merge, state_of
from .sysfs import SysfsSource

__all__ = ["ThermalMonitor", "monitor"]

log = logging.getLogger("jetrt.thermal")

#: A sample or a reading counts for this many intervals.
LIFETIME: Final = 3
#: Seconds after which a source that was absent is looked for again.
LOOK_AGAIN_S: Final = 60.0
#: Seconds for which closing waits for threads that are in the middle of something.
PATIENCE_S: Final = 0.5


class Published(NamedTuple):
    state: ThermalState
    reading: Reading
    #: Why what is unknown is unknown.
    notes: tuple[str, ...]


class ThermalMonitor:
    """Measures once per `interval_s` seconds until it is closed or dropped.

    root: folder below which the kernel's files lie. nvml: ``"auto"`` asks NVML where `nvidia-ml-py` is installed, True
    demands the package, False never asks. device: the GPU's number in CUDA's count. log: whether transitions and the
    loss of telemetry are logged, to the logger ``jetrt.thermal``. wait_s: how long to wait here, once, for the first
    answer of every source; readers never wait.

    Raises ValueError for a senseless argument, TelemetryUnavailableError for ``nvml=True`` without the package.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] = "/",
        interval_s: float = 1.0,
        nvml: bool | Literal["auto"] = "auto",
        device: int = 0,
        log: bool = True,
        wait_s: float = 0.5,
    ) -> None:
        _check(interval_s, nvml, device)
        self._root, self._interval_s, self._nvml, self._device, self._log = root, interval_s, nvml, device, log
        self._latest = _Latest(LIFETIME * interval_s)
        self._lock = threading.Lock()
        self._warned = self._closed = False
        #: None in a forked child that has not read yet.
        self._poller: _Poller | None
        self._finalizer: weakref.finalize[[], ThermalMonitor]
        poller = self._start()
        _monitors.add(self)
        if wait_s > 0:
            poller.settled.wait(wait_s)

    def state(self) -> ThermalState:
        """The last state, without waiting. An unknown throttle state is False, after one warning."""
        found: Published | None = self._latest.get()
        return (self._unknown() if found is None else found).state

    def snapshot(self) -> Reading:
        """Everything that is known, without waiting; ``None`` is unknown."""
        found: Published | None = self._latest.get()
        return (self._unknown() if found is None else found).reading

    def require(self) -> ThermalState:
        """As `state`. Raises TelemetryUnavailableError when it is not known whether the GPU is throttled."""
        found: Published = self._latest.get() or self._unknown()
        if found.reading.throttle_active is None:
            reason = "; ".join(found.notes)
            raise TelemetryUnavailableError(
                f"Whether GPU {self._device} is throttled is unknown: {reason}. "
                "A caller that steers by it goes on as if it were not, and says so once.",
                source="sysfs" if self._nvml is False else "sysfs, nvml",
                reason=reason,
            )
        return found.state

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Ends the threads, but for one that hangs in a source; it ends with the call. Closing again does nothing."""
        with self._lock:
            self._closed = True
            self._finalizer()
            self._latest.clear()

    def __enter__(self) -> ThermalMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sources(self) -> list[Source]:
        """The most trusted first: NVML on Jetson reports success with garbage."""
        sources: list[Source] = [SysfsSource(self._root)]
        if self._nvml is not False:
            sources.append(NvmlSource(self._device))
        return sources

    def _start(self) -> _Poller:
        poller = _Poller(self._sources(), self._latest, self._interval_s, self._device, self._log)
        # At interpreter exit, too, and once the monitor is dropped: the threads know the poller alone.
        self._finalizer = weakref.finalize(self, poller.stop)
        self._poller = poller
        poller.start()
        return poller

    def _forked(self) -> None:
        # In the child: the threads are the parent's, and so may be whoever holds a lock.
        self._finalizer.detach()
        self._lock = threading.Lock()
        self._poller, self._warned = None, False
        self._latest.clear()

    def _unknown(self) -> Published:
        """Nothing was published lately."""
        poller, notable = self._poller, True
        if self._closed:
            note = "the monitor is closed"
        elif poller is None:
            note, notable = "this process was forked, and nothing is measured in it yet", False
            self._revive()
        elif not poller.settled.is_set():
            note, notable = "nothing is measured yet", False
        else:
            note = f"nothing was published for {LIFETIME * self._interval_s:g} s"
        if self._log and notable and not self._warned:
            self._warned = True
            # On a thread of its own: what holds up the publishing thread may be the very handler that this goes to.
            with contextlib.suppress(RuntimeError):  # at interpreter exit
                threading.Thread(target=_warn_unknown, args=(self._device, (note,)), daemon=True).start()
        reading = Reading(measured_at=time.monotonic_ns())
        return Published(state_of(reading), reading, (note,))

    def _revive(self) -> None:
        # Whoever comes second need not wait for the first.
        if self._lock.acquire(blocking=False):
            try:
                if self._poller is None and not self._closed:
                    self._start()
            finally:
                self._lock.release()


def _check(interval_s: Any, nvml: Any, device: Any) -> None:
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise ValueError(f"device is {device!r}; it must be the number of a GPU, 0 or above")
    if not isinstance(interval_s, (int, float)) or not 0.01 <= interval_s <= 3600:
        raise ValueError(f"interval_s is {interval_s!r}; allowed: 0.01 to 3600 seconds")
    if nvml not in (True, False, "auto"):
        raise ValueError(f"nvml is {nvml!r}; allowed: True, False, 'auto'")
    if nvml is True and find_spec("pynvml") is None:
        reason = f"the package {PACKAGE} is not installed"
        raise TelemetryUnavailableError(
            f"NVML was asked for, and {reason}: pip install {PACKAGE}", source="nvml", reason=reason
        )


class _Poller:
    """Threads of one monitor. They hold no reference to it, so that dropping it ends them."""

    def __init__(self, sources: Sequence[Source], latest: _Latest, interval_s: float, device: int, logs: bool) -> None:
        self._sources, self._latest, self._interval_s = sources, latest, interval_s
        self._transitions = _Transitions(device) if logs else None
        # By name of the source, replaced as a whole by its thread: (when, what it found), or why it finds nothing. What
        # was found before a look that failed counts until it is old.
        self._samples: dict[str, tuple[int, Any]] = {}
        self._absent: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self._stop, self._wake = threading.Event(), threading.Event()
        #: Every source has answered once, or was given up waiting for.
        self.settled = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._started = time.monotonic_ns()
        for source in self._sources:
            self._run(f"jetrt-{source.name}", self._ask, source)
        self._run("jetrt-thermal", self._publish_until_stopped)

    def _run(self, name: str, body: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=body, args=arguments, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        deadline = time.monotonic() + PATIENCE_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _ask(self, source: Source) -> None:
        name = source.name
        while not self._stop.is_set():
            pause = self._interval_s
            try:
                found = source.sample()
            except Absent as reason:
                self._samples.pop(name, None)
                self._absent[name] = str(reason)
                if reason.lasting:
                    break
                pause = max(LOOK_AGAIN_S, pause)
            except Exception as error:
                self._failed[name] = f"{type(error).__name__}: {error}"
            else:
                self._samples[name] = (time.monotonic_ns(), found)
                self._absent.pop(name, None)
                self._failed.pop(name, None)
            self._wake.set()
            self._stop.wait(pause)
        self._wake.set()
        source.close()

    def _publish_until_stopped(self) -> None:
        failed = False
        while not self._stop.is_set():
            self._wake.wait(self._interval_s)
            self._wake.clear()
            try:
                self._publish()
            except Exception:
                # Nothing is published then, so that readers see it grow old.
                if not failed and not self._stop.is_set():
                    _say(logging.ERROR, "thermal state cannot be published", event="telemetry_failed", exc_info=True)
                failed = True

    def _publish(self) -> None:
        now = time.monotonic_ns()
        oldest = now - int(LIFETIME * self._interval_s * 1e9)
        fresh: dict[str, Sample] = {}
        at = [now]
        mute, notes, waiting = [], [], False
        for name in (source.name for source in self._sources):
            found, absent, failed = self._samples.get(name), self._absent.get(name), self._failed.get(name)
            since = self._started if found is None else found[0]
            if found is not None and since >= oldest:
                fresh[name] = found[1]
                at.append(since)
                notes.append(f"{name}: says nothing about throttling")
            elif absent is not None:
                notes.append(f"{name}: {absent}")
            elif failed is None and since < oldest:
                mute.append(f"{name}: no answer for {(now - since) / 1e9:.0f} s")
            elif failed is None:
                waiting = True
                notes.append(f"{name}: has not answered yet")
            if failed is not None:
                mute.append(f"{name}: {failed}")
        reading = merge(fresh, silent=tuple(mute), measured_at=min(at))
        if self._stop.is_set():
            return  # closed meanwhile; the cell stays empty
        self._latest.publish(Published(state_of(reading), reading, (*notes, *mute)))
        if not waiting:
            self.settled.set()
        if self._transitions is not None:
            self._transitions.see(reading, (*notes, *mute), settled=not waiting)


class _Transitions:
    """What is logged: changes, not readings."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._unknown = False
        self._known: dict[str, bool] = {"throttle_active": False, "power_throttle_active": False}

    def see(self, reading: Reading, notes: Sequence[str], *, settled: bool) -> None:
        if reading.throttle_active is None:
            if settled and not self._unknown:
                self._unknown = True
                _warn_unknown(self._device, notes)
        elif self._unknown:
            self._unknown = False
            self._log(logging.INFO, "telemetry available", "telemetry_available", reading)
        if self._changed("throttle_active", reading.throttle_active):
            entered = reading.throttle_active
            text, event = ("active", "entered") if entered else ("ended", "left")
            self._log(logging.WARNING, f"thermal throttle {text}", f"thermal_throttle_{event}", reading, always=True)
        if self._changed("power_throttle_active", reading.power_throttle_active):
            entered = reading.power_throttle_active
            text, event = ("active", "entered") if entered else ("ended", "left")
            self._log(logging.INFO, f"power throttle {text}", f"power_throttle_{event}", reading)

    def _changed(self, name: str, now: bool | None) -> bool:
        """Against what was known last: a gap in between is no transition."""
        if now is None or now == self._known[name]:
            return False
        self._known[name] = now
        return True

    def _log(self, level: int, text: str, event: str, reading: Reading, *, always: bool = False) -> None:
        degrees = "unknown" if reading.gpu_temp_c is None else f"{reading.gpu_temp_c:.0f}C"
        clock = "unknown" if reading.gpu_clock_mhz is None else f"{reading.gpu_clock_mhz}mhz"
        reasons = ",".join(reading.reasons) or "none"
        fields = {
            "device": self._device,
            "cpu_temp_c": reading.cpu_temp_c,
            "gpu_temp_c": reading.gpu_temp_c,
            "clock_mhz": reading.gpu_clock_mhz,
            "clock_max_mhz": reading.gpu_clock_max_mhz,
            "power_w": reading.power_w,
            "reasons": list(reading.reasons),
            "measured_at": reading.measured_at,
        }
        text = f"{text}; gpu_temp={degrees}; clock={clock}; reasons={reasons}"
        _say(level, text, event=event, fields=fields, always=always)


def _warn_unknown(device: int, notes: Sequence[str]) -> None:
    text = f"telemetry unavailable; whether GPU {device} is throttled is unknown and taken as no: {'; '.join(notes)}"
    fields = {"device": device, "reasons": list(notes)}
    _say(logging.WARNING, text, event="telemetry_unavailable", fields=fields, always=True)


def _say(level: int, text: str, *, exc_info: bool = False, **extra: Any) -> None:
    # A handler of the program's that raises must end neither a thread here nor a reader's call.
    with contextlib.suppress(Exception):
        log.log(level, "%s", text, extra=extra, exc_info=exc_info)


# ------------------------------------------------------------------------------------------- one for the process

_monitors: weakref.WeakSet[ThermalMonitor] = weakref.WeakSet()
_shared: dict[int, ThermalMonitor] = {}
_shared_lock = threading.Lock()


def monitor(device: int = 0) -> ThermalMonitor:
    """The monitor that everything in this process shares, for that GPU; started when it is asked for first, which waits
    up to half a second for the first answers."""
    found = _shared.get(device)
    if found is None or found.closed:
        with _shared_lock:
            found = _shared.get(device)
            if found is None or found.closed:
                found = _shared[device] = ThermalMonitor(device=device)
    return found


def _after_fork() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()
    for each in list(_monitors):
        each._forked()


os.register_at_fork(after_in_child=_after_fork)
