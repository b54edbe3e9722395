"""Small models, compressed in the ways that finalized models are checked for."""

from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, PalettizationSpec
from coreai_opt.palettization.config import ModuleKMeansPalettizerConfig
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, PruningSpec
from coreai_opt.pruning.config import ModuleMagnitudePrunerConfig
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import QuantizationSpec, default_activation_quantization_spec


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)).eval()


def example(model: nn.Module) -> tuple[Tensor, ...]:
    """An input of :func:`mlp` or :func:`cnn`."""
    torch.manual_seed(1)
    first = model[0] if isinstance(model, nn.Sequential) else next(iter(model.children()))
    return (torch.randn(1, 16, 8, 8) if isinstance(first, nn.Conv2d) else torch.randn(4, 64),)


def quantizer(
    model: nn.Module,
    weight: dict[str, Any] | None,
    activation: dict[str, Any] | None = None,
    mode: str = "eager",
) -> Quantizer:
    """A quantizer that has prepared the model: fields of the specification of weights, and of activations."""
    act = None
    if activation is not None:
        act = {"*": default_activation_quantization_spec().model_copy(update=activation)}
        if activation:
            act = {"*": QuantizationSpec(**activation)}
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(
            op_state_spec=None if weight is None else {"weight": QuantizationSpec(**weight)},
            op_input_spec=act,
            op_output_spec=act,
        ),
        execution_mode=mode,
    )
    made = Quantizer(model, config)
    made.prepare(example(model))
    return made


def palettizer(model: nn.Module, **fields: Any) -> KMeansPalettizer:
    """A palettizer that has prepared the model, for a specification of these fields."""
    config = KMeansPalettizerConfig(
        global_config=ModuleKMeansPalettizerConfig(
            op_state_spec={"weight": PalettizationSpec(**fields)},
            enable_fast_kmeans_mode=fields.get("cluster_dim", 1) == 1,
        )
    )
    made = KMeansPalettizer(model, config)
    made.prepare(example(model))
    return made


def pruner(model: nn.Module, sparsity: float = 0.5, **fields: Any) -> MagnitudePruner:
    """A pruner that has prepared the model."""
    config = MagnitudePrunerConfig(
        global_config=ModuleMagnitudePrunerConfig(
            op_state_spec={"weight": PruningSpec(target_sparsity=sparsity, **fields)}
        )
    )
    made = MagnitudePruner(model, config)
    made.prepare(example(model))
    return made


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """The model's output for its example, in evaluation mode."""
    return model.eval()(*example(model))
