"""What pages take for granted: a model, its data, and the like, small ones. ``of`` gives those of a page."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import coreai_opt
from coreai_opt import ExportBackend


def _cnn() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 32),
        nn.ReLU(),
        nn.Linear(32, 16),
    )
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(16, (8,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "coreai_opt": coreai_opt,
        "ExportBackend": ExportBackend,
        "model": model,
        "float_model": copy.deepcopy(model),
        "fresh_model": copy.deepcopy(model),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "criterion": nn.CrossEntropyLoss(),
        "images": images,
        "labels": labels,
        "loader": loader,
        "train_loader": loader,
        "val_loader": loader,
        "example_inputs": (images,),
        "epochs": 1,
    }


def _modes(names: dict[str, Any]) -> None:
    from coreai_opt.quantization import Quantizer, QuantizerConfig

    model = names["model"]
    names.update(Quantizer=Quantizer, QuantizerConfig=QuantizerConfig, quantizer=Quantizer(model))


def _prepared(names: dict[str, Any]) -> None:
    result = coreai_opt.quantize(names["model"], names["images"], "w4")
    names.update(model=result.model, prepared=result.model)


def _finalizing(names: dict[str, Any]) -> None:
    """With a quantizer that finalizes copies: two ways are shown, one below the other."""
    prepared, quantizer = coreai_opt.quantize(names["float_model"], names["images"], "w4")
    finalize = quantizer.finalize
    quantizer.finalize = lambda **how: finalize(copy.deepcopy(prepared), **how)
    names.update(x=names["images"], quantizer=quantizer)


def _specifications(names: dict[str, Any]) -> None:
    from coreai_opt.quantization import QuantizationSpec
    from coreai_opt.quantization.spec import PerBlockGranularity

    names.update(QuantizationSpec=QuantizationSpec, PerBlockGranularity=PerBlockGranularity)


def _pruned(names: dict[str, Any]) -> None:
    from coreai_opt.palettization import PalettizationSpec
    from coreai_opt.pruning import MagnitudePruner

    pruner = MagnitudePruner(copy.deepcopy(names["model"]))
    pruner.prepare((names["images"],))
    names.update(pruner=pruner, PalettizationSpec=PalettizationSpec)


def _batches(names: dict[str, Any]) -> None:
    names.update(batches=[(names["images"],)])


def _calibrated(names: dict[str, Any]) -> None:
    from coreai_opt.quantization import Quantizer, QuantizerConfig

    config = QuantizerConfig.presets.w4()
    config.execution_mode = "eager"
    names.update(quantizer=Quantizer(names["model"], config))


def _controllers(names: dict[str, Any]) -> None:
    import coreai_opt.controllers as controllers

    names.update({name: getattr(controllers, name) for name in controllers.__all__})
    config = {
        "input_info": {"sample_size": [1, 3, 8, 8]},
        "compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    names.update(config=config, path="training.pt")


def _llama(names: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from coreai_opt.integrations import transformers as ours

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(64, (2, 8))
    model.save_pretrained("float-model")
    names.update({name: getattr(ours, name) for name in ours.__all__})
    names.update(
        model=model,
        batch={"input_ids": ids},
        AutoModelForCausalLM=transformers.AutoModelForCausalLM,
        Trainer=transformers.Trainer,
        data=[{"input_ids": each, "labels": each} for each in ids],
        arguments=transformers.TrainingArguments(
            output_dir="out", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        ),
    )


_MORE: dict[str, Callable[[dict[str, Any]], None]] = {
    "casting.md": lambda names: names.update(loader=[names["images"]]),
    "controllers.md": _controllers,
    "execution-modes.md": _modes,
    "export.md": _finalizing,
    "first-steps.md": lambda names: None,
    "formats.md": _specifications,
    "inspection.md": _prepared,
    "palettization.md": _pruned,
    "post-training.md": _calibrated,
    "search.md": _batches,
    "transformers.md": _llama,
}


def of(page: str) -> dict[str, Any]:
    """Names that a page uses and does not define."""
    names = _cnn()
    if page in _MORE:
        _MORE[page](names)
    return names
