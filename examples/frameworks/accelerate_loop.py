"""QAT and pruning in a loop of accelerate: ``python examples/frameworks/accelerate_loop.py``.

``accelerate launch`` runs the same on several processes: the compressors step on all of them.
"""

import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from coreai_opt import ExportBackend
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig
from coreai_opt.quantization import Quantizer, QuantizerConfig

SPARSITY = {
    "op_state_spec": {"weight": {"target_sparsity": 0.5}},
    "sparsity_schedule": {"type": "polynomial_decay", "begin_step": 0, "total_iters": 10},
}


def main() -> float:
    """The last loss."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, data = tiny.model(), tiny.sequences()
    # Before accelerator.prepare, which may wrap the model.
    pruner = MagnitudePruner(
        model, MagnitudePrunerConfig.from_dict({"magnitude_pruning_config": {"global_config": SPARSITY}})
    )
    pruner.prepare((data[:2],))
    config = QuantizerConfig.presets.w4()
    config.execution_mode = "eager"
    quantizer = Quantizer(model, config)
    quantizer.prepare((data[:2],))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    wrapped, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(data, batch_size=16, shuffle=True)
    )
    with quantizer.training_mode():
        for _ in range(10):
            for ids in loader:
                with accelerator.accumulate(wrapped):
                    loss = wrapped(ids, labels=ids).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:  # the optimizer has made a step
                        pruner.step()
    pruner.finalize(backend=ExportBackend.Torch)
    compressed = quantizer.finalize(backend=ExportBackend.Torch)
    weight = compressed.model.layers[0].mlp.up_proj.weight
    zeros = (weight == 0).float().mean().item()
    accelerator.print(f"loss {loss.item():.3f}; {zeros:.0%} zeros in a weight")
    if zeros < 0.5:
        raise RuntimeError(f"half of the weight should be zero, not {zeros:.0%}")
    return loss.item()


if __name__ == "__main__":
    main()
