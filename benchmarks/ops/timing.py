"""Clocks. A turn of a provider is one call on a cold cache, or several on a warm one, timed as the device sees them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# A warm turn lasts about this long: short calls are timed together.
TURN_SECONDS = 1e-3
LONGEST_TURN = 50


@dataclass(frozen=True)
class Subject:
    """A call, warmed up."""

    call: Callable[[], object]
    repeats: int
    """Calls in a turn on a warm cache."""
    host_seconds: float
    """How long the host takes to queue one call."""


class CpuClock:
    def __init__(self) -> None:
        self.scratch = torch.zeros(2 * cpu_cache_bytes(), dtype=torch.uint8)

    def turn(self, subject: Subject, cold: bool) -> Callable[[], float]:
        """Makes the calls of a turn. What comes back gives the seconds of one call, once `finish` was called."""
        repeats = 1 if cold else subject.repeats
        if cold:
            self.scratch.add_(1)  # through the cache, which zero_ may bypass
        else:
            subject.call()
        start = time.perf_counter()
        for _ in range(repeats):
            subject.call()
        seconds = (time.perf_counter() - start) / repeats
        return lambda: seconds

    def finish(self) -> None:
        """Waits until all turns are over."""


class CudaClock:
    """Events around the calls of a turn. A kernel that only waits goes first, so that the host has queued all calls
    before the device begins with them: neither the host's time nor a synchronization is in the figure. It is what the
    operation takes inside a CUDA graph."""

    def __init__(self, device: str) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.zeros(2 * cache, dtype=torch.uint8, device=device)

    def turn(self, subject: Subject, cold: bool) -> Callable[[], float]:
        repeats = 1 if cold else subject.repeats
        if cold:
            self.scratch.add_(1)
        else:
            subject.call()
        wait = min(20e-3, 2 * subject.host_seconds * repeats + 200e-6)
        torch.cuda._sleep(int(wait * 2e9))  # cycles; a slower clock waits longer
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            subject.call()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3 / repeats

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


Clock = CpuClock | CudaClock


def clock_for(device: str) -> Clock:
    return CudaClock(device) if device.startswith("cuda") else CpuClock()


def warm_up(clock: Clock, call: Callable[[], object]) -> Subject:
    """Calls until everything is compiled and allocated, and sees how long a call takes."""
    for _ in range(2):
        call()
    clock.finish()
    start = time.perf_counter()
    call()
    host_seconds = time.perf_counter() - start
    clock.finish()
    seconds = time.perf_counter() - start
    return Subject(call, min(LONGEST_TURN, max(1, round(TURN_SECONDS / seconds))), host_seconds)


def cpu_cache_bytes() -> int:
    """Size of the last-level cache, 32 MB where Linux does not say."""
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [level.read_text().strip() for level in levels]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)
