"""Models of transformers: ``from_pretrained`` and ``save_pretrained`` of prepared ones, a Trainer callback.

Importing this module registers ``quant_method: coreai-opt`` with transformers.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from coreai_opt import _prepared_models, one_call
from coreai_opt._plain_names import PREFIX, decoded, plain_state, steps_key
from coreai_opt.base_model_compressor import _BaseModelCompressor
from coreai_opt.checkpoint import (
    description_of,
    description_of_finalized,
    restore,
    restore_finalized,
)
from coreai_opt.export.checkpoints import without_ties
from coreai_opt.integrations._example_inputs import example_inputs_of
from coreai_opt.integrations._trainer_callback import CompressionCallback

__all__ = ["CompressionCallback", "CompressionConfig", "attach", "compressors_of", "save_pretrained"]

_METHOD = "coreai-opt"
_COMPRESSORS = "_coreai_opt_compressors"


@register_quantization_config(_METHOD)
class CompressionConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` compresses a model: ``quantization_config`` of its ``config.json``.

    Args:
        scheme: for a float model: of :func:`coreai_opt.quantize`.
        preparation: of a model that was saved: how it was prepared. :func:`save_pretrained` writes it.
        inputs: for a scheme: as for :func:`coreai_opt.quantize`; activations are calibrated on them. None for
            one example of text, images or sound, as the model takes. They are not saved.

    Raises:
        ValueError: neither a scheme nor a preparation is given, or both are; or inputs without a scheme.

    Example:
        >>> config = CompressionConfig("w4")
        >>> model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    """

    def __init__(
        self,
        scheme: str | None = None,
        preparation: Mapping[str, Any] | None = None,
        inputs: Any = None,
        **_: Any,
    ) -> None:
        if (scheme is None) == (preparation is None):
            raise ValueError(
                "CompressionConfig takes either a scheme, for a float model, or a preparation, of a saved one"
            )
        if scheme is not None:
            one_call.check_scheme(scheme)
        elif inputs is not None:
            raise ValueError("inputs are for a scheme: a model that was saved has its own")
        self.quant_method: Any = _METHOD
        self.scheme = scheme
        self.preparation = preparation
        self.inputs = inputs

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` has of it."""
        return {
            "quant_method": self.quant_method,
            "scheme": self.scheme,
            "preparation": copy.deepcopy(self.preparation),
        }


@register_quantizer(_METHOD)
class CompressionQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves a model."""

    requires_calibration = False
    quantization_config: CompressionConfig

    def __init__(self, quantization_config: CompressionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[str] = []

    def is_serializable(self) -> bool:
        """Models are saved as they are, prepared or finalized."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Prepared models are there to be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """They are trained whole, not by way of adapters alone."""
        return True

    @property
    def is_compileable(self) -> bool:
        """They compile."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any
    ) -> None:
        self._files = list(checkpoint_files or ())
        _check_files(self._files, Path(model.config._name_or_path))
        # What simulators hold: it is read once they are there.
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, rf"(^|\.){PREFIX.replace('.', r'[.]')}"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if config.preparation is None:
            inputs = example_inputs_of(model) if config.inputs is None else config.inputs
            result = one_call.quantize(model, inputs, config.scheme)  # type: ignore[arg-type]
            config.inputs = None
            compressors: tuple[_BaseModelCompressor, ...] = (result.compressor,)
        else:
            state: Any = _State(_simulators_in(self._files))
            state._metadata = config.preparation["metadata"]
            if config.preparation.get("is_finalized"):
                restore_finalized(model, config.preparation, state)
                return
            compressors = restore(model, config.preparation, state, only_simulators=True).compressors
        setattr(model, _COMPRESSORS, compressors)

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state under plain names, of which transformers takes a float model, too."""
        if not _prepared_models.preparations_of(model) and not _prepared_models.finalized_of(model):
            # Finalized since: it is a float model.
            self.remove_quantization_config(model)
            return None, {}
        self.quantization_config.scheme = None
        self.quantization_config.preparation = _preparation_of(model)
        state = plain_state(model)
        own = without_ties({name: value for name, value in state.items() if name.startswith(PREFIX)})
        for kind in _prepared_models.preparations_of(model):
            own[steps_key(kind)] = torch.tensor(_prepared_models.steps_of(model, kind))
        return {name: value for name, value in state.items() if name not in own} | own, {}


class _State(dict[str, Tensor]):
    """A state_dict, which has metadata beside its tensors."""


def save_pretrained(model: PreTrainedModel, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a prepared model as a folder from which ``from_pretrained`` brings it back.

    So does one that is finalized for torch and goes on simulating activations. Weights have the names and
    values of a float model, as which the folder loads without this package, too.

    Args:
        model: a model of transformers, prepared in eager mode.
        folder: where to.
        kwargs: further arguments of ``PreTrainedModel.save_pretrained``.

    Raises:
        TypeError: it is no model of transformers.
        RuntimeError: it is not prepared, or finalized and has no simulators left, so that its own
            ``save_pretrained`` does.
    """
    attach(model).save_pretrained(folder, **kwargs)


def attach(model: Any) -> PreTrainedModel:
    """Let the model's own ``save_pretrained``, which a Trainer calls, write as :func:`save_pretrained`.

    Returns:
        The model.

    Raises:
        TypeError, RuntimeError: as for :func:`save_pretrained`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers in eager mode; got {type(model).__name__}")
    config = CompressionConfig(preparation=_preparation_of(model))
    if not isinstance(getattr(model, "hf_quantizer", None), CompressionQuantizer):
        setattr(model, "hf_quantizer", CompressionQuantizer(config))  # noqa: B010
        model.config.quantization_config = config
    return model


def compressors_of(model: nn.Module) -> tuple[_BaseModelCompressor, ...]:
    """The compressors of a model that ``from_pretrained`` has prepared, in their order."""
    return getattr(model, _COMPRESSORS, ())


def _preparation_of(model: nn.Module) -> dict[str, Any]:
    description = description_of_finalized(model)
    if description is not None:
        description["is_finalized"] = True
    else:
        description = description_of(model)
    # Steps alone: shards have no room for the versions of all modules' states.
    description["metadata"] = {"": description["metadata"].get("", {})}
    del description["parameters"]
    return description


def _check_files(files: list[str], folder: Path) -> None:
    """ValueError if the index in a local folder names files elsewhere."""
    if not folder.is_dir():
        return
    for file in files:
        if not Path(file).is_relative_to(folder) or ".." in Path(file).relative_to(folder).parts:
            raise ValueError(f"the checkpoint {folder} names a file outside of its folder: {file}")


def _simulators_in(files: list[str]) -> dict[str, Tensor]:
    return dict(_read(files))


def _read(files: list[str]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"a compressed model is in safetensors files; got {path}")
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (name := decoded(key)) is not None:
                    yield name, file.get_tensor(key)
