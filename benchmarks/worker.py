"""The process that runs Apple's package: ``python -m benchmarks.worker FOLDER [ENGINE ...]``.

With folders of the engine's packages the plugin puts it under Apple's.
Reads requests from standard input and answers on standard output, one JSON object a line.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.clustering_run import cluster
from benchmarks.core_ai_run import compress_program
from benchmarks.models.training_step import TrainingStep
from benchmarks.pruning import PRUNING, Pruning
from benchmarks.simulation import Simulation
from benchmarks.timing import seconds_per_call, settle_allocator
from benchmarks.vector_clustering_run import cluster_vectors

__all__ = ["main"]


class Worker:
    """Answers requests; holds what is timed: the simulation, or the training steps by config and mode."""

    simulation: Simulation | Pruning | None = None

    def __init__(self) -> None:
        self.steps: dict[tuple[str, str], TrainingStep] = {}

    def prepare(self, case: dict[str, Any], with_digest: bool) -> str:
        parsed = Case(**case)
        torch.set_num_threads(parsed.threads)
        self.simulation = Pruning(parsed) if parsed.op == PRUNING else Simulation(parsed)
        return self.simulation.digest() if with_digest else ""

    def sample(self, phase: str, calls: int, untimed_call: bool) -> float:
        if self.simulation is None:
            raise RuntimeError("nothing was prepared")
        return seconds_per_call(self.simulation.call(phase), calls, untimed_call=untimed_call)

    def release(self) -> None:
        self.simulation = None
        self.steps.clear()

    def prepare_training(self, model: str, config: str, mode: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        step = self.steps[config, mode] = TrainingStep(model, config, mode)
        return {"digest": step.digest(), "simulators": step.simulators}

    def sample_training(self, config: str, mode: str, calls: int, cpu_time: bool) -> float:
        return self.steps[config, mode].seconds(calls, cpu_time)

    def cluster(self, **case: Any) -> dict[str, float]:
        return cluster(**case)

    def compress_program(self, **case: Any) -> dict[str, float]:
        return compress_program(**case)

    def cluster_vectors(self, **case: Any) -> dict[str, float]:
        return cluster_vectors(**case)

    def memory(self, case: dict[str, Any]) -> dict[str, float]:
        return memory.of_simulation(Simulation(Case(**case)))


def main(folder: str, *engine: str) -> None:
    """Serve until standard input ends."""
    # Whatever the package prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [folder, *engine]
    import coreai_opt

    if not Path(str(coreai_opt.__file__)).resolve().is_relative_to(Path(folder).resolve()):
        raise ImportError(f"coreai_opt was imported from {coreai_opt.__file__}, not from {folder}")
    if engine:
        import coreai_accelerate

        coreai_accelerate.activate()
    settle_allocator()
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("do"))(**request)}
        except Exception:  # noqa: BLE001  (whatever it is, the process that asked reports it)
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
