"""Temperatures, clocks and throttling of this machine, measured in the background and read without waiting.

    monitor = jetrt.thermal.monitor()  # one per process and GPU, started here
    monitor.state().thermal_throttle_active  # never blocks; unknown counts as False, with one warning
    monitor.require()  # raises TelemetryUnavailableError instead
    monitor.snapshot()  # everything that is known, and where from

On Jetson the kernel's files are read, which needs nothing; elsewhere NVML, through the package `nvidia-ml-py`. Each
source has a thread of its own, so that one that hangs takes neither the other nor a reader with it.
"""

from .polling import ThermalMonitor, monitor
from .reading import Reading

__all__ = ["Reading", "ThermalMonitor", "monitor"]
