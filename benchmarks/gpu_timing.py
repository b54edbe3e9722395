"""How the GPU check measures."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Timer", "figures"]


class Timer:
    """Median device time of a function, in microseconds, with a cold L2 cache."""

    def __init__(self, repeats: int) -> None:
        properties = torch.cuda.get_device_properties(0)
        cache = int(getattr(properties, "L2_cache_size", 64 << 20))
        self._flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device="cuda")
        self._repeats = repeats

    def __call__(self, run: Callable[[], Any]) -> float:
        """Replays a CUDA graph of ``run`` where it can be captured, or else calls it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            replay: Callable[[], Any] = graph.replay
        except RuntimeError:  # it waits for the device, or allocates what a graph may not
            torch.cuda.synchronize()
            replay = run
        times = []
        for _ in range(self._repeats):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) * 1000.0 for start, end in times)


def host_time(run: Callable[[], Any], calls: int = 200) -> float:
    """Microseconds of host time a call, with the device left to catch up afterwards."""
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def attempt(timer: Timer, run: Callable[[], Any] | None) -> tuple[float | None, str | None]:
    """Time, or why there is none: torch's operators refuse some dtypes."""
    if run is None:
        return None, None
    try:
        return timer(run), None
    except (RuntimeError, NotImplementedError, TypeError) as error:
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def figures(
    timer: Timer,
    ours: Callable[[], Any],
    moved: float,
    copied: int,
    copy: float,
    contenders: Mapping[str, Callable[[], Any] | None],
) -> dict[str, Any]:
    """Times and ratios of one operation.

    Args:
        timer: measures.
        ours: the operation.
        moved: bytes of the least traffic.
        copied: bytes that the copy moves.
        copy: the copy's time in microseconds.
        contenders: the same by others, by name; None for those that have nothing of the kind.
    """
    time_us = timer(ours)
    floor = copy * moved / copied
    found = {
        "time_us": time_us,
        "host_us": host_time(ours),
        "copy_us": copy,
        "floor_us": floor,
        "floor_over_time": floor / time_us,
        "gigabytes_per_second": moved / time_us / 1e3,
    }
    for name, run in contenders.items():
        theirs, error = attempt(timer, run)
        found |= {
            f"{name}_us": theirs,
            f"{name}_over_time": theirs and theirs / time_us,
            f"{name}_error": error,
        }
    return found
