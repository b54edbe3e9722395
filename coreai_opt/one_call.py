"""From a model to a compressed one in one call, in terms of the compressors and their configurations."""

import copy
import logging
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from coreai_opt import _left_out
from coreai_opt._call_inputs import Inputs, read_inputs
from coreai_opt._state_tensors import check_model
from coreai_opt._unusual_weights import UnusualWeight, attention_weights, quantized, unusual_weights
from coreai_opt._utils.config_utils import did_you_mean
from coreai_opt.base_model_compressor import _BaseModelCompressor, backend_of
from coreai_opt.common import ExportBackend
from coreai_opt.config.compression_config import CompressionConfig, ModuleCompressionConfig
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization.spec import (
    PalettizationSpec,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
)
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.pruning.config import OpMagnitudePrunerConfig
from coreai_opt.pruning.spec import NMStructured, PruningSpec
from coreai_opt.quantization import ExecutionMode, ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm
from coreai_opt.quantization.post_training.observation import finite_ranges
from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationSpec

__all__ = ["Compressed", "check_scheme", "palettize", "prune", "quantize"]

logger = logging.getLogger(__name__)

_C = TypeVar("_C", bound=_BaseModelCompressor)
Filter = Callable[[str, nn.Module], Any]


class Compressed(NamedTuple, Generic[_C]):
    """A compressed model, and what compressed it.

    Attributes:
        model: prepared for training, or finalized.
        compressor: goes on from here: ``training_mode()``, ``step()``, ``finalize()``, ``summary()``.
    """

    model: nn.Module
    compressor: _C

    @property
    def config(self) -> Any:
        """The configuration. ``config.to_yaml()`` is its text, which ``from_yaml`` of its class reads."""
        return self.compressor._config


def _mxfp4() -> ModuleQuantizerConfig:
    spec = QuantizationSpec(
        dtype="float4_e2m1fn_x2",  # type: ignore[arg-type]
        scale_dtype="float8_e8m0fnu",  # type: ignore[arg-type]
        granularity=PerBlockGranularity(axis=None, block_size=32),
    )
    return ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec})


_SCHEMES: dict[str, Callable[[], ModuleQuantizerConfig]] = {
    "w4": ModuleQuantizerConfig.presets.w4_per_block,
    "w8": ModuleQuantizerConfig.presets.w8,
    "w8a8": lambda: ModuleQuantizerConfig.model_validate({}),
    "mxfp4": _mxfp4,
}
_BITS = (1, 2, 3, 4, 6, 8)
# Channels that share a palette.
_GROUP = 16


def quantize(
    model: nn.Module,
    inputs: Any,
    scheme: str | QuantizerConfig = "w4",
    *,
    head: bool | str | None = None,
    filter_fn: Filter | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    num_batches: int = 100,
    dynamic_shapes: Any = None,
    algorithm: Any = None,
    state_path: str | Path | None = None,
    finalize: ExportBackend | str | None = None,
) -> Compressed[Quantizer]:
    """Quantize a model: prepare it, calibrate activations on the data, and finalize it on request.

    With the name of a scheme, the model is prepared in eager mode, and norms, embeddings and routers of
    experts are left out; so is a head that has its weight from an embedding. A weight that blocks of 32 do
    not divide is left out, too, with a warning in the log.

    Args:
        model: is changed in place, but in graph mode.
        inputs: what one forward takes: a tensor, a tuple of positional arguments, or a mapping of keyword
            ones, such as a BatchEncoding; or any other iterable of batches, such as a DataLoader. Of a batch
            that is a tuple or list, ``forward`` gets as many as it requires; what follows are targets.
        scheme: ``"w4"``, int4 weights in blocks of 32; ``"w8"``, int8 weights by channels; ``"w8a8"``, int8
            weights and activations; ``"mxfp4"``, fp4 weights in blocks of 32 with scales of powers of two; or
            a configuration, which is taken as it is.
        head: for a scheme's name: False leaves the layer of the output out, True does not, a scheme's name is
            another for it.
        filter_fn: gets the name and the module of each that has parameters; those for which it is false are
            left out, and the modules inside of them.
        input_fn: takes a batch and returns what one forward takes.
        num_batches: batches that calibrate activations at most, and that an algorithm sees. Without either
            one batch is read.
        dynamic_shapes: for graph mode, as in :meth:`Quantizer.prepare`.
        algorithm: how weights are chosen, such as ``"gptq"``, ``"awq"`` or ``AWQ(steps=40)``, or several in a
            list: see :meth:`Quantizer.calibrate`. None rounds them to nearest.
        state_path: a folder in which an algorithm keeps finished layers, to go on there.
        finalize: the backend to finalize for; None for a model that is prepared for training.

    Returns:
        The model and its :class:`~coreai_opt.quantization.Quantizer`.

    Raises:
        TypeError: an argument has the wrong type, or ``forward`` does not take the inputs.
        ValueError: there is no such scheme, no batch, no head, or ``num_batches`` is below 1; or the data
            give an activation a range that is not finite. Other errors as of :class:`Quantizer`.
    """
    if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 1:
        raise ValueError(f"num_batches must be an int of at least 1; got {num_batches!r}")
    check_model(model)
    algorithms = PostTrainingAlgorithm.list_of(algorithm)
    finalize = None if finalize is None else backend_of(finalize, "finalize")

    if isinstance(scheme, str):
        config = QuantizerConfig(global_config=_scheme(scheme), execution_mode=ExecutionMode.EAGER)
        for each in (*_left_out.norm_types(model), *_left_out.embedding_types(model)):
            config.set_module_type(each, None)
        weights = [*unusual_weights(model), *attention_weights(model)]
        _add_unusual_weights(model, weights, config, _quantized_entry(_scheme(scheme)))
        _leave_out_routers_and_head(model, config, head, _scheme)
    else:
        config = _copied(scheme, QuantizerConfig, "scheme", head)
    _apply_filter(model, config, filter_fn)
    quantizer = Quantizer(model, config)
    found = read_inputs(model, inputs, input_fn)
    prepared = quantizer.prepare(found.example, dynamic_shapes)  # type: ignore[arg-type]
    if algorithms:
        batches = None if found.batches is None else list(islice(found.batches, num_batches))
        quantizer._run_algorithms(algorithms, [found.example] if batches is None else batches, state_path)
    elif found.batches is not None and quantizer.summary().activations:
        _calibrate(quantizer, prepared, found, num_batches)
    return _finished(prepared, quantizer, finalize)


def prune(
    model: nn.Module,
    inputs: Any,
    amount: float | str | MagnitudePrunerConfig = 0.5,
    *,
    head: bool | float | str | None = None,
    filter_fn: Filter | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    finalize: ExportBackend | str | None = None,
) -> Compressed[MagnitudePruner]:
    """Prune a model's weights by magnitude, and finalize it on request.

    Args:
        model: is changed in place.
        inputs: as for :func:`quantize`; one batch is read.
        amount: the share of each weight to prune, in (0, 1); or ``"n:m"``, such as ``"2:4"``: of every ``m``
            inputs of a channel ``n`` stay, and weights whose inputs ``m`` does not divide are left out; or a
            configuration, which is taken as it is.
        head: for an amount: False leaves the layer of the output out, True does not, and another amount is
            for it.
        filter_fn: as for :func:`quantize`.
        input_fn: as for :func:`quantize`.
        finalize: as for :func:`quantize`.

    Returns:
        The model and its :class:`~coreai_opt.pruning.MagnitudePruner`.

    Raises:
        TypeError, ValueError: as for :func:`quantize`. Other errors as of :class:`MagnitudePruner`.
    """
    check_model(model)
    finalize = None if finalize is None else backend_of(finalize, "finalize")
    if isinstance(amount, MagnitudePrunerConfig):
        config = _copied(amount, MagnitudePrunerConfig, "amount", head)
    else:
        config = MagnitudePrunerConfig(global_config=_pruned(amount))
        _add_unusual_weights(model, unusual_weights(model), config, _pruned_entry(amount))
        _leave_out_routers_and_head(model, config, head, _pruned)
        if isinstance(amount, str):
            _leave_out(model, config, _undivided(model, int(amount.partition(":")[2])))
    _apply_filter(model, config, filter_fn)
    return _of_weights(model, MagnitudePruner(model, config), inputs, input_fn, finalize)


def palettize(
    model: nn.Module,
    inputs: Any,
    n_bits: int | KMeansPalettizerConfig = 4,
    *,
    head: bool | int | None = None,
    filter_fn: Filter | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    finalize: ExportBackend | str | None = None,
) -> Compressed[KMeansPalettizer]:
    """Replace the values of a model's weights by those of palettes, and finalize it on request.

    Args:
        model: is changed in place.
        inputs: as for :func:`quantize`; one batch is read.
        n_bits: of an index into a palette: 1, 2, 3, 4 or 6, with a palette for every 16 channels of the
            output (one for the weight, where 16 does not divide these); 8, with one for each weight; or a
            configuration, which is taken as it is.
        head: for a number of bits: False leaves the layer of the output out, True does not, another number is
            for it.
        filter_fn: as for :func:`quantize`.
        input_fn: as for :func:`quantize`.
        finalize: as for :func:`quantize`.

    Returns:
        The model and its :class:`~coreai_opt.palettization.KMeansPalettizer`.

    Raises:
        TypeError, ValueError: as for :func:`quantize`. Other errors as of :class:`KMeansPalettizer`.
    """
    check_model(model)
    finalize = None if finalize is None else backend_of(finalize, "finalize")
    if isinstance(n_bits, KMeansPalettizerConfig):
        config = _copied(n_bits, KMeansPalettizerConfig, "n_bits", head)
    else:
        config = KMeansPalettizerConfig(global_config=_palettized(n_bits))
        ungrouped = _ungrouped(model)
        for pattern in _left_out.patterns(model, ungrouped):
            config.set_module_name(pattern, _palettized(n_bits, in_groups=False))
        _add_unusual_weights(model, unusual_weights(model), config, _palettized_entry(n_bits))
        in_groups = _left_out.find_head(model) not in ungrouped
        _leave_out_routers_and_head(model, config, head, lambda given: _palettized(given, in_groups))
    _apply_filter(model, config, filter_fn)
    return _of_weights(model, KMeansPalettizer(model, config), inputs, input_fn, finalize)


def check_scheme(name: Any) -> None:
    """ValueError unless there is a scheme of this name."""
    if not isinstance(name, str) or name not in _SCHEMES:
        known = ", ".join(map(repr, _SCHEMES))
        raise ValueError(
            f"scheme must be {known} or a QuantizerConfig; got {name!r}.{did_you_mean(name, _SCHEMES)}"
        )


def _scheme(name: Any) -> ModuleQuantizerConfig:
    check_scheme(name)
    return _SCHEMES[name]()


def _pruned(amount: Any) -> ModuleMagnitudePrunerConfig:
    if isinstance(amount, str):
        match = re.fullmatch(r"(\d+):(\d+)", amount)
        if match is None:
            raise ValueError(f"amount must be a share such as 0.5, or n:m such as '2:4'; got {amount!r}")
        n, m = map(int, match.groups())

        def states(axis: int) -> dict[str, Any]:
            spec = PruningSpec(pruning_scheme=NMStructured(n=n, m=m, axis=axis))
            return {"weight": spec, "in_proj_weight": spec}

        transposed: dict[str, OpMagnitudePrunerConfig | None] = {
            f"conv_transpose{axes}d": OpMagnitudePrunerConfig(
                op_input_spec=None, op_output_spec=None, op_state_spec=states(0)
            )
            for axes in (1, 2, 3)
        }
        return ModuleMagnitudePrunerConfig(
            op_input_spec=None, op_output_spec=None, op_state_spec=states(1), op_type_config=transposed
        )
    if not isinstance(amount, float | int) or isinstance(amount, bool):
        raise TypeError(
            f"amount must be a share, 'n:m' or a MagnitudePrunerConfig; got {type(amount).__name__}"
        )
    if not 0 < amount < 1:
        raise ValueError(f"amount must be a share between 0 and 1, the ends excluded; got {amount}")
    spec = PruningSpec(target_sparsity=amount)
    return ModuleMagnitudePrunerConfig(
        op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec, "in_proj_weight": spec}
    )


def _palettized(n_bits: Any, in_groups: bool = True) -> ModuleKMeansPalettizerConfig:
    if not isinstance(n_bits, int) or isinstance(n_bits, bool):
        raise TypeError(f"n_bits must be an int or a KMeansPalettizerConfig; got {type(n_bits).__name__}")
    if n_bits not in _BITS:
        raise ValueError(f"n_bits must be one of {', '.join(map(str, _BITS))}; got {n_bits}")
    grouped = in_groups and n_bits != 8
    granularity = (
        PerGroupedChannelGranularity(axis=0, group_size=_GROUP) if grouped else PerTensorGranularity()
    )
    spec = PalettizationSpec(n_bits=n_bits, granularity=granularity)  # type: ignore[arg-type]
    return ModuleKMeansPalettizerConfig(
        op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec, "in_proj_weight": spec}
    )


def _ungrouped(model: nn.Module) -> list[str]:
    """Names of the layers whose weights have a number of channels that groups do not divide."""
    weights = (
        (name, module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight)
        for name, module in model.named_modules()
        if isinstance(module, (nn.MultiheadAttention, *_left_out.Weighted))
    )
    return [name for name, weight in weights if isinstance(weight, Tensor) and weight.shape[0] % _GROUP]


def _add_unusual_weights(
    model: nn.Module,
    found: Iterable[UnusualWeight],
    config: CompressionConfig[Any],
    entry: Callable[[dict[str, UnusualWeight]], ModuleCompressionConfig[Any, Any]],
) -> None:
    """Configure the weights that no operation reads as its weight, by the modules that hold them."""
    by_module: dict[str, dict[str, UnusualWeight]] = {}
    for each in found:
        by_module.setdefault(each.module_name, {})[each.attribute] = each
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, weights in by_module.items():
        form = tuple((each.attribute, each.weight.dim(), *each[3:]) for each in weights.values())
        groups.setdefault(form, []).append(name)
    for names in groups.values():
        for pattern in _left_out.patterns(model, names):
            config.set_module_name(pattern, entry(by_module[names[0]]))


def _quantized_entry(
    scheme: ModuleQuantizerConfig,
) -> Callable[[dict[str, UnusualWeight]], ModuleQuantizerConfig]:
    spec: Any = (scheme.op_state_spec or {})["weight"]
    received, returned = ((each or {}).get("*") for each in (scheme.op_input_spec, scheme.op_output_spec))

    def entry(found: dict[str, UnusualWeight]) -> ModuleQuantizerConfig:
        factors = range(max(each.factors for each in found.values()))
        return ModuleQuantizerConfig(
            op_input_spec=None,
            op_output_spec=None,
            op_state_spec=None,
            module_state_spec={name: quantized(each, spec) for name, each in found.items()},
            module_input_spec=None if received is None else dict.fromkeys(factors, received) or None,
            module_output_spec={0: returned} if factors and returned is not None else None,
        )

    return entry


def _pruned_entry(amount: float | str) -> Callable[[dict[str, UnusualWeight]], ModuleMagnitudePrunerConfig]:
    def spec(found: UnusualWeight) -> PruningSpec:
        if not isinstance(amount, str):
            return PruningSpec(target_sparsity=amount)
        n, m = map(int, amount.split(":"))
        return PruningSpec(pruning_scheme=NMStructured(n=n, m=m, axis=found.input_axis))

    def entry(found: dict[str, UnusualWeight]) -> ModuleMagnitudePrunerConfig:
        return ModuleMagnitudePrunerConfig(
            op_input_spec=None,
            op_output_spec=None,
            op_state_spec=None,
            module_state_spec={name: spec(each) for name, each in found.items()},
        )

    return entry


def _palettized_entry(n_bits: int) -> Callable[[dict[str, UnusualWeight]], ModuleKMeansPalettizerConfig]:
    def spec(found: UnusualWeight) -> PalettizationSpec:
        granularity: Any = PerTensorGranularity()
        if n_bits != 8 and found.input_axis != 1:
            # Channels of the output, of all experts together.
            granularity = PerGroupedChannelGranularity(axis=1, group_size=_GROUP)
        return PalettizationSpec(n_bits=n_bits, granularity=granularity)  # type: ignore[arg-type]

    def entry(found: dict[str, UnusualWeight]) -> ModuleKMeansPalettizerConfig:
        return ModuleKMeansPalettizerConfig(
            op_input_spec=None,
            op_output_spec=None,
            op_state_spec=None,
            module_state_spec={name: spec(each) for name, each in found.items()},
        )

    return entry


def _undivided(model: nn.Module, m: int) -> list[str]:
    """Names of the layers whose weights have a number of inputs a channel that ``m`` does not divide."""
    found = []
    for name, module in model.named_modules():
        weight: Any = None
        if isinstance(module, nn.MultiheadAttention):
            weight = module.in_proj_weight
        elif isinstance(module, _left_out.Weighted):
            weight = module.weight
        if weight is not None:
            is_transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
            if weight.shape[0 if is_transposed else 1] % m:
                found.append(name)
    found += [each.module_name for each in unusual_weights(model) if each.weight.shape[each.input_axis] % m]
    if found:
        logger.info(f"left out, as {m} does not divide their inputs: {', '.join(found)}")
    return found


def _leave_out_routers_and_head(
    model: nn.Module,
    config: CompressionConfig[Any],
    head: Any,
    entry: Callable[[Any], ModuleCompressionConfig[Any, Any]],
) -> None:
    _leave_out(model, config, _left_out.routers(model))
    name = _left_out.find_head(model)
    if name is None:
        if head is not None:
            raise ValueError(
                f"head={head!r}: {type(model).__name__} has no linear layer or convolution that could be "
                f"its head"
            )
        return
    tied = _left_out.is_tied(model, name)
    if head is False or (head is None and tied):
        _leave_out(model, config, [name])
    elif head is True and tied:
        # By name: takes precedence over what is said of the embedding's type.
        config.set_module_name(re.escape(name), copy.deepcopy(config.global_config))
    elif head is not None and head is not True:
        try:
            given = entry(head)
        except TypeError as error:
            raise TypeError(f"head: {error}") from None
        except ValueError as error:
            raise ValueError(f"head: {error}") from None
        config.set_module_name(re.escape(name), given)


def _apply_filter(model: nn.Module, config: CompressionConfig[Any], filter_fn: Filter | None) -> None:
    if filter_fn is None:
        return
    if not callable(filter_fn):
        raise TypeError(
            f"filter_fn must be a function of a module's name and the module; got {type(filter_fn).__name__}"
        )
    _leave_out(model, config, _left_out.refused_by(filter_fn, model))


def _leave_out(model: nn.Module, config: CompressionConfig[Any], names: list[str]) -> None:
    for pattern in _left_out.patterns(model, names):
        config.set_module_name(pattern, None)


def _copied(config: Any, kind: type[Any], argument: str, head: Any) -> Any:
    if not isinstance(config, kind):
        raise TypeError(f"{argument} must be a name or a {kind.__name__}; got {type(config).__name__}")
    if head is not None:
        raise ValueError(
            f"head={head!r} is for a {argument} by name; in a {kind.__name__}, module_name_configs say "
            f"what is done with a layer"
        )
    return config.model_copy(deep=True)


def _of_weights(
    model: nn.Module, compressor: _C, inputs: Any, input_fn: Callable[[Any], Any] | None, finalize: Any
) -> Compressed[_C]:
    found = read_inputs(model, inputs, input_fn)
    prepared = compressor.prepare(found.example)  # type: ignore[arg-type]
    return _finished(prepared, compressor, finalize)


def _calibrate(quantizer: Quantizer, prepared: nn.Module, inputs: Inputs, num_batches: int) -> None:
    total = None if inputs.length is None else min(inputs.length, num_batches)
    with (
        finite_ranges(prepared),
        quantizer.calibration_mode(),
        torch.no_grad(),
        tqdm(desc="Calibrating", total=total) as bar,
    ):
        for each in islice(inputs.batches or (), num_batches):
            prepared(*each.args, **each.kwargs)
            bar.update()


def _finished(prepared: nn.Module, compressor: _C, finalize: Any) -> Compressed[_C]:
    if finalize is None:
        return Compressed(prepared, compressor)
    return Compressed(compressor.finalize(backend=finalize), compressor)
