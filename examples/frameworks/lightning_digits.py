"""QAT of a small network on digits in Lightning's Trainer.

``python examples/frameworks/lightning_digits.py``
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import coreai_opt
from coreai_opt.integrations.lightning import CompressionCallback


class Digits(lightning.LightningModule):  # type: ignore[misc]
    """Classifies rows of 64 pixels with a model that is prepared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def main() -> float:
    """Accuracy of the finalized model on the data that it was not trained on."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    prepared, quantizer = coreai_opt.quantize(model, loader, "w8a8")
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[CompressionCallback(quantizer)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(prepared), loader)
    final = quantizer.finalize(backend="torch").eval()
    with torch.no_grad():
        accuracy = (final(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    print(f"int8 accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
