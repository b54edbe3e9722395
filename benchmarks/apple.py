"""Apple's package as a contender, in a process of its own: both packages own the import name.

By itself, and with the plugin that puts the engine under it.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import coreai_kernels
from benchmarks.cases import Case

__all__ = ["Apple", "AppleError"]

_ROOT = Path(__file__).parents[1]


class AppleError(RuntimeError):
    """Apple's package raised, or its process ended."""


class Apple:
    """A running worker. Close it, or use it as a context manager.

    Args:
        folder: where the package is.
        accelerated: with the plugin.

    Raises:
        FileNotFoundError: there is no package in ``folder``.
        AppleError: from any method, if the package fails; the text holds its traceback.
    """

    def __init__(self, folder: Path, accelerated: bool = False) -> None:
        if not (folder / "coreai_opt").is_dir():
            raise FileNotFoundError(
                f"no package coreai_opt in {folder}. To fix: "
                f"pip install --no-deps --target {folder} coreai-opt==0.4.0"
            )
        # The engine that this process runs on, and the plugin's source beside it if it is not installed.
        engine = [str(Path(str(coreai_kernels.__file__)).parents[1]), str(_ROOT / "kernels")]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(folder.resolve()), *(engine * accelerated)],
            cwd=_ROOT,
            # The plugin may be installed here, and would be activated by the import.
            env=os.environ | {"PYTHONPATH": str(_ROOT), "COREAI_ACCELERATE": str(int(accelerated))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self, case: Case, *, with_digest: bool = False) -> str:
        """Build the case's simulator; its fingerprint, if so wished."""
        return self._ask("prepare", case=asdict(case), with_digest=with_digest)  # type: ignore[no-any-return]

    def sample(self, phase: str, calls: int, *, untimed_call: bool) -> float:
        """Time of a call of what was prepared."""
        return self._ask("sample", phase=phase, calls=calls, untimed_call=untimed_call)  # type: ignore[no-any-return]

    def release(self) -> None:
        """Free what was prepared."""
        self._ask("release")

    def prepare_training(self, model: str, config: str, mode: str, threads: int) -> dict[str, Any]:
        """Build a model's training step; a fingerprint of its first steps, and the number of simulators."""
        return self._ask("prepare_training", model=model, config=config, mode=mode, threads=threads)  # type: ignore[no-any-return]

    def sample_training(self, config: str, mode: str, calls: int, cpu_time: bool) -> float:
        """Time of a training step that was prepared."""
        return self._ask("sample_training", config=config, mode=mode, calls=calls, cpu_time=cpu_time)  # type: ignore[no-any-return]

    def cluster(self, **case: Any) -> dict[str, float]:
        """See :func:`benchmarks.clustering_run.cluster`."""
        return self._ask("cluster", **case)  # type: ignore[no-any-return]

    def compress_program(self, **case: Any) -> dict[str, float]:
        """See :func:`benchmarks.core_ai_run.compress_program`."""
        return self._ask("compress_program", **case)  # type: ignore[no-any-return]

    def cluster_vectors(self, **case: Any) -> dict[str, float]:
        """See :func:`benchmarks.vector_clustering_run.cluster_vectors`."""
        return self._ask("cluster_vectors", **case)  # type: ignore[no-any-return]

    def memory(self, case: Case) -> dict[str, float]:
        """See :func:`benchmarks.memory.of_simulation`."""
        return self._ask("memory", case=asdict(case))  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()
        self._log.close()

    def _ask(self, request: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": request, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise AppleError(f"the worker ended:\n{self._log.read()}")
        answer = json.loads(line)
        if "error" in answer:
            raise AppleError(f"Apple's package failed:\n{answer['error']}")
        return answer["value"]
