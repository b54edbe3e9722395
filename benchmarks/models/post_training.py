"""Post-training algorithms on the CPU: processor time and error, GPTQ beside another public implementation.

    python -m benchmarks.models.post_training --width 512 --blocks 4 --samples 16

A Llama of transformers with random weights, on random tokens; weights of int4 in groups. Contenders: this
package, and llm-compressor's GPTQ if it is installed, also block after block. (torchao 0.18 has a GPTQ that
runs on CUDA only.) They run in one process, one after another; the time is the process's own, over all
threads.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.post_training import GPTQ, AdaRound
from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationSpec

__all__ = ["main"]

HEAD, NORM = "lm_head", "transformers.models.llama.modeling_llama.LlamaRMSNorm"


def llama(arguments: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 3,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the blocks' linear layers."""
    layers = {name: each for name, each in model.named_modules() if hasattr(each, "weight")}
    return {
        name: each.weight.detach().clone()
        for name, each in layers.items()
        if name.startswith("model.layers") and each.weight.dim() == 2
    }


def ours(model: nn.Module, batches: list[Tensor], group: int, algorithm: Any) -> nn.Module:
    granularity = PerBlockGranularity(axis=1, block_size=group)
    spec = QuantizationSpec(dtype="int4", granularity=granularity)  # type: ignore[arg-type]
    layer = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec})
    config = QuantizerConfig(
        execution_mode="eager",  # type: ignore[arg-type]
        global_config=layer,
        module_name_configs={HEAD: None},
        module_type_configs={nn.Embedding: None, NORM: None},
    )
    quantizer = Quantizer(model, config)
    quantizer.prepare((batches[0],))
    quantizer.calibrate(batches, algorithm, num_batches=len(batches))
    return quantizer.finalize(backend="torch")  # type: ignore[arg-type]


def llm_compressor(model: nn.Module, batches: list[Tensor], group: int) -> nn.Module:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # It asks for one, and has no use for it with tokens.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    rows = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=args)},
        ignore=[HEAD],
        dampening_frac=0.01,
        block_size=128,
    )
    with tempfile.TemporaryDirectory() as folder:
        # It reads the configuration of the model's name again.
        model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        model.name_or_path = model.config._name_or_path = folder  # type: ignore[union-attr, assignment]
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=DataLoader(rows, batch_size=None),  # type: ignore[arg-type]
            recipe=recipe,
            num_calibration_samples=len(rows),
            pipeline="sequential",
        )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--only", nargs="*", help="contenders to run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.samples, arguments.tokens)
    batches = list(torch.randint(1024, shape, generator=generator).split(1))
    model = llama(arguments)
    size = sum(each.numel() for each in weights_of(model).values())
    with torch.no_grad():
        exact = [model(batch).logits for batch in batches[:4]]
    group = arguments.group
    contenders: dict[str, Callable[[nn.Module], nn.Module]] = {
        "ours, int4": lambda m: ours(m, batches, group, GPTQ(act_order=False)),
        "ours, int4, act_order": lambda m: ours(m, batches, group, "gptq"),
        "rounding to nearest": lambda m: ours(m, batches, group, None),
        "ours, awq": lambda m: ours(m, batches, group, "awq"),
        "ours, smoothquant": lambda m: ours(m, batches, group, "smoothquant"),
        "ours, adaround 100": lambda m: ours(m, batches, group, AdaRound(iterations=100)),
        "ours, bias correction": lambda m: ours(m, batches, group, "bias_correction"),
        "ours, equalization": lambda m: ours(m, batches, group, "cross_layer_equalization"),
        "llm-compressor, int4": lambda m: llm_compressor(m, batches, group),
    }
    results: dict[str, dict[str, float]] = {}
    print(f"{size / 1e6:.1f} M weights, {arguments.samples * arguments.tokens} tokens")
    for name, run in contenders.items():
        if arguments.only and name not in arguments.only:
            continue
        copied = copy.deepcopy(model)
        began, wall = time.process_time(), time.perf_counter()
        try:
            chosen = run(copied)
        except ImportError as error:
            print(f"{name:26s} not installed: {error}")
            continue
        seconds, wall = time.process_time() - began, time.perf_counter() - wall
        with torch.no_grad():
            found = [chosen(batch).logits for batch in batches[:4]]
        errors = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
        relative = errors / sum(float(each.square().sum()) for each in exact)
        results[name] = {"processor_seconds": seconds, "seconds": wall, "relative_error": relative}
        print(f"{name:26s} {seconds:8.1f} s of processor {wall:8.1f} s  relative error {relative:.3e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
