"""A recipe in the manner of torchtune: setup, train, checkpoints, and a second run that goes on from one.

``python examples/frameworks/recipe.py``. torchtune itself is not needed; its recipes differ in names.
"""

import tempfile
from pathlib import Path

import tiny
import torch

import coreai_opt


class Recipe:
    """Trains a model with int4 weights.

    Args:
        folder: of checkpoints.
        resume: a step whose checkpoint to go on from; None to begin.
    """

    def __init__(self, folder: Path, resume: int | None = None) -> None:
        self.folder, self.step = folder, resume or 0
        self.data = tiny.sequences()
        if resume is None:
            self.model, self.quantizer = coreai_opt.quantize(
                tiny.model(), {"input_ids": self.data[:2]}, "w4", head=True
            )
        else:
            path = folder / f"{resume}.safetensors"
            self.model, (self.quantizer,) = coreai_opt.load_checkpoint(tiny.model(), path)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 5e-3)
        if resume is not None:
            self.optimizer.load_state_dict(torch.load(folder / f"{resume}.pt", weights_only=True))

    def train(self, until: int) -> float:
        """Steps with two micro-batches each, and a checkpoint after the last one. Gives the last loss."""
        with self.quantizer.training_mode():
            while self.step < until:
                total = 0.0
                for micro in self.data.roll(self.step, 0)[:32].chunk(2):
                    loss = self.model(micro, labels=micro).loss / 2
                    loss.backward()
                    total += loss.item()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
        coreai_opt.save_checkpoint(self.model, self.folder / f"{self.step}.safetensors")
        torch.save(self.optimizer.state_dict(), self.folder / f"{self.step}.pt")
        return total


def main() -> None:
    """Ten steps at once, and five with five from a checkpoint: the same loss."""
    with tempfile.TemporaryDirectory() as folder:
        at_once = Recipe(Path(folder)).train(10)
        Recipe(Path(folder)).train(5)
        resumed = Recipe(Path(folder), resume=5).train(10)
    print(f"loss {at_once:.4f} at once, {resumed:.4f} from a checkpoint")
    if at_once != resumed:
        raise RuntimeError("the second run should be the first one's continuation, bit for bit")


if __name__ == "__main__":
    main()
