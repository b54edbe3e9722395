"""Trains with int4 weights, generates with the cache, saves, and comes back.

``python examples/frameworks/generate.py``
"""

import tempfile

import tiny
import torch
from transformers import AutoModelForCausalLM

import coreai_opt
from coreai_opt.integrations.transformers import compressors_of, save_pretrained


def main() -> list[int]:
    """What the model says after a prompt."""
    data = tiny.sequences()
    model, quantizer = coreai_opt.quantize(tiny.model(), {"input_ids": data[:2]}, "w4", head=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with quantizer.training_mode():
        for _ in range(60):
            loss = model(data, labels=data).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    def said(by: torch.nn.Module, **options: bool) -> list[int]:
        found = by.generate(data[:1, :8], max_new_tokens=8, do_sample=False, **options)  # type: ignore[operator]
        return found[0, 8:].tolist()  # type: ignore[no-any-return]

    with_cache = said(model)
    print("prompt", data[0, :8].tolist(), "goes on", with_cache, "loss", f"{loss.item():.2f}")
    if with_cache != said(model, use_cache=False):
        raise RuntimeError("the cache should make no difference")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()  # prepared
    if said(again) != with_cache:
        raise RuntimeError("a model that was saved should say the same")
    (quantizer,) = compressors_of(again)
    final = quantizer.finalize(backend="torch")
    if said(final) != with_cache:
        raise RuntimeError("the finalized model should say the same")
    return with_cache


if __name__ == "__main__":
    main()
