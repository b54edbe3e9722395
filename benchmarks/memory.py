"""Memory of a simulator's training step, by tracking the allocator: ``python -m benchmarks --op memory``."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case
from benchmarks.simulation import TRAINING, Simulation

# Else the profiler announces each start on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

__all__ = ["CASES", "held_and_peak_bytes", "of_simulation"]

CASES = (
    Case("memory", "int4", "block 32", 2048, "fp32", 1, TRAINING, "static"),
    Case("memory", "int8", "tensor", 2048, "bf16", 1, TRAINING, "moving_average"),
)


def held_and_peak_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``call``'s result keeps allocated, and the most that were allocated meanwhile.

    Counts what torch's allocator gives out, to operators of any origin, beyond what it had given out before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del result
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return held, peak


def of_simulation(simulation: Simulation) -> dict[str, float]:
    """Bytes an element: at most allocated in a step, and kept between forward and backward.

    The output and the input's gradient are among the former. The latter is without the output.
    """
    simulation.training_step()  # buffers take their shapes
    numel = simulation.input.numel()
    held, _ = held_and_peak_bytes(simulation.forward)
    _, peak = held_and_peak_bytes(simulation.training_step)
    saved = held - numel * simulation.input.element_size()
    return {"peak_bytes": peak, "peak_per_element": peak / numel, "saved_per_element": saved / numel}
