"""What the oracle's process runs: its package is imported, and one module of this folder answers a job."""

import pickle
from importlib import import_module
from pathlib import Path

import torch

__all__ = ["load", "main"]


def load(folder: str, keep_traces: bool) -> None:
    """Import the package in a folder, for all jobs that are forked from this process.

    Args:
        folder: is on the path, before any other.
        keep_traces: patterns of its graph mode are traced here, once. See `torchao_patterns`.
    """
    torch.set_num_threads(1)
    if keep_traces:
        from . import torchao_patterns

        torchao_patterns.keep_traces()
    import coreai_opt

    if Path(folder).resolve() not in Path(str(coreai_opt.__file__)).resolve().parents:
        raise SystemExit(f"imported {coreai_opt.__file__}, not the package in {folder}")
    if keep_traces:
        from coreai_opt.quantization import Quantizer, QuantizerConfig

        torchao_patterns.keep_copies()
        with torch.random.fork_rng():
            Quantizer(torch.nn.Sequential(torch.nn.Linear(2, 2)), QuantizerConfig()).prepare(
                (torch.ones(1, 2),)
            )


def main(job_file: str, result_file: str, accelerated: bool) -> None:
    """Have the job's module answer it.

    The job and the result are pickles of plain data. ``job["module"]`` names a module of this folder with a
    function ``answer(job)``.
    """
    job = pickle.loads(Path(job_file).read_bytes())
    if accelerated:
        import coreai_accelerate

        coreai_accelerate.activate()
    result = import_module(f".{job.get('module', 'runner')}", __package__).answer(job)
    if accelerated:
        status = coreai_accelerate.status()
        result["status"] = {"hits": status.fast_path["hits"], "fallbacks": status.fallbacks}
    Path(result_file).write_bytes(pickle.dumps(result))
