"""What the oracle's process runs: one job, answered by one module of this folder."""

import pickle
import sys
from importlib import import_module
from pathlib import Path

import torch

__all__ = ["main"]


def main(job_file: str, result_file: str) -> None:
    """Put the folder that the job names first on the path, and have the job's module answer it.

    The job and the result are pickles of plain data. ``job["module"]`` names a module of this folder with a
    function ``answer(job)``. ``job["keep_traces"]`` is False for releases that `torchao_patterns` is not for.
    """
    job = pickle.loads(Path(job_file).read_bytes())
    sys.path[:0] = [job["package_folder"], *job["engine"]]
    torch.set_num_threads(1)
    if job.get("keep_traces", True):
        from . import torchao_patterns

        torchao_patterns.keep_traces()
    import coreai_opt

    if Path(job["package_folder"]).resolve() not in Path(str(coreai_opt.__file__)).resolve().parents:
        raise SystemExit(f"imported {coreai_opt.__file__}, not the package in {job['package_folder']}")
    if job.get("keep_traces", True):
        torchao_patterns.keep_copies()
    if job["engine"]:
        import coreai_accelerate

        coreai_accelerate.activate()
    result = import_module(f".{job.get('module', 'runner')}", __package__).answer(job)
    if job["engine"]:
        status = coreai_accelerate.status()
        result["status"] = {"hits": status.fast_path["hits"], "fallbacks": status.fallbacks}
    Path(result_file).write_bytes(pickle.dumps(result))
