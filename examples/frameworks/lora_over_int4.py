"""LoRA adapters over a model with int4 weights, merged in the end.

``python examples/frameworks/lora_over_int4.py``
"""

import peft
import tiny
import torch

import coreai_opt
from coreai_opt.integrations.peft import merge_and_unload


def main() -> tuple[float, float]:
    """Losses with adapters, before and after training."""
    data = tiny.sequences()
    model, quantizer = coreai_opt.quantize(tiny.model(), {"input_ids": data[:2]}, "w4")
    model.requires_grad_(False)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], lora_alpha=32),
    )
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], 2e-2)
    losses = []
    for _ in range(40):
        loss = adapted(data, labels=data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    merged = merge_and_unload(adapted)  # into the weights behind the simulators
    final = quantizer.finalize(merged, backend="torch")
    with torch.no_grad():
        after = final(data, labels=data).loss.item()
    print(f"loss {losses[0]:.2f}, with adapters {losses[-1]:.2f}, merged and in int4 {after:.2f}")
    return losses[0], after


if __name__ == "__main__":
    main()
