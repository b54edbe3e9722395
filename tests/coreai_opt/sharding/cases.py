"""What four gloo processes try together; not collected: ``test_sharding.py`` runs it, once for all cases.

``python -m tests.coreai_opt.sharding.cases passed.txt`` writes the names of the cases that passed. The first
one that fails ends the run.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.coreai_opt.sharding import tensors, training

RANKS = 4


def cases() -> dict[str, Callable[[Path], None]]:
    """All of them, by name; the folder is one for all ranks."""
    return {**tensors.CASES, **training.CASES}


def _work(rank: int, path: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(path) + ".store", RANKS)
    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=patience)
    for name, case in cases().items():
        try:
            case(path.parent)
        except Exception as error:
            error.add_note(f"in case {name}")
            raise
        dist.barrier()
        if rank == 0:
            with path.open("a") as passed:
                print(name, file=passed)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked: the libraries are imported once.
    mp.start_processes(_work, (Path(sys.argv[1]),), RANKS, start_method="fork")
