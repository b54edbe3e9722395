"""Training that loses a rank in mid-schedule; not collected: ``test_sharding.py`` runs it.

``torchrun --standalone --nproc-per-node 2 --max-restarts 1 -m tests.coreai_opt.sharding.restarted FOLDER``: a
checkpoint a step; on the first attempt rank 1 dies after two, and the second attempt goes on from there.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.coreai_opt.sharding.training import STEPS, Run, sharded

COMPRESSION = "pruned and int4"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # A store an attempt: torchrun's own keeps the addresses of the dead.
    meeting = (folder / f"store-{attempt}").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    run = Run(COMPRESSION, after=sharded(init_device_mesh("cpu", (2,))), rank=(rank, 2))
    saved = sorted(folder.glob("step-*"))
    if attempt:
        assert len(saved) == 2, "the checkpoints of the first attempt"
        run.load(saved[-1], int(saved[-1].name.removeprefix("step-")))
    while run.done < STEPS:
        run.train(1)
        run.save(folder / f"step-{run.done}")
        dist.barrier()
        if attempt == 0 and run.done == 2:
            if rank == 1:
                os._exit(9)
            dist.barrier()  # waits for the dead until torchrun ends it
    trained = run.state()
    if rank == 0:
        torch.save(trained, folder / "trained.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
