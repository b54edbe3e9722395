"""The quantizer: whole models."""

import warnings
from typing import Any

from torch import nn

from coreai_opt._state_tensors import check_example_inputs
from coreai_opt.base_model_compressor import PREPARED_BY_QUANTIZER
from coreai_opt.common import ExportBackend
from coreai_opt.quantization._eager import preparation
from coreai_opt.quantization._eager.operations import MODULES
from coreai_opt.quantization._export import finalize_eager
from coreai_opt.quantization.base_quantizer import _BaseQuantizer
from coreai_opt.quantization.config import ExecutionMode, QuantizerConfig

__all__ = ["Quantizer"]


class Quantizer(_BaseQuantizer):
    """Quantizes a model: first in simulation, so that it can be calibrated or trained.

    Weights are simulated where modules read them, activations where operations (linear, convolutions,
    embedding, matmul, add, sub, mul, max_pool2d, adaptive_avg_pool2d) receive and return them, in whichever
    module's forward these are called. See :class:`~coreai_opt.quantization.QuantizerConfig`.

    Where a specification leaves the axis of a weight open, channels are those of the output (axis 0; 1 for
    transposed convolutions), and blocks lie along the input (axis 1; 0 for transposed convolutions).

    Args:
        model: is changed in place.
        config: which tensors, and how. Its execution mode must be eager: graph mode is not available.
    """

    _supported_modules = MODULES

    def __init__(self, model: nn.Module, config: QuantizerConfig | None = None) -> None:
        super().__init__(model, config)
        eager = self._config.execution_mode is ExecutionMode.EAGER
        if eager and self._config.preserved_attributes is not None:
            warnings.warn("preserved_attributes has no effect in eager mode", UserWarning, stacklevel=2)

    def prepare(
        self,
        example_inputs: tuple[Any, ...],
        dynamic_shapes: Any = None,
        export_with_no_grad: bool = True,
    ) -> nn.Module:
        """Put simulators on the model, let them observe ``example_inputs``, and return the model.

        The model runs twice, in evaluation mode and without gradients. Afterwards simulators are on and
        observe nothing: see :meth:`calibration_mode` and :meth:`training_mode`. If anything fails, the model
        is as before.

        Args:
            example_inputs: the model's positional arguments.
            dynamic_shapes: no effect in eager mode, where all shapes are dynamic.
            export_with_no_grad: no effect in eager mode.

        Raises:
            NotImplementedError: the configuration asks for graph mode, or names tensors of operations by
                other than positions.
            TypeError: ``example_inputs`` is no tuple.
            RuntimeError: parameters are on the meta device.
            ValueError: a granularity leaves its axis open where there is no default.
        """
        if self._is_prepared(self._model):
            warnings.warn(
                "the model is prepared for quantization already: prepare() changes nothing",
                UserWarning,
                stacklevel=2,
            )
            return self._model
        if self._config.execution_mode is not ExecutionMode.EAGER:
            raise NotImplementedError(
                "execution_mode='graph', the default of QuantizerConfig, is not available in this package. "
                "Use QuantizerConfig(execution_mode='eager'), or config.set_execution_mode('eager')."
            )
        check_example_inputs(example_inputs)
        _refuse_meta(self._model)
        if dynamic_shapes is not None:
            warnings.warn("dynamic_shapes has no effect in eager mode", UserWarning, stacklevel=2)
        if not export_with_no_grad:
            warnings.warn("export_with_no_grad has no effect in eager mode", UserWarning, stacklevel=2)
        preparation.prepare(self._model, self._config, example_inputs)
        setattr(self._model, PREPARED_BY_QUANTIZER, True)
        return self._model

    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend = ExportBackend.CoreAI,
        *,
        mmap_dir: Any = None,
    ) -> nn.Module:
        """Turn the simulation into the quantized model, in place, and return the model.

        For Core AI, weights are held as they are stored, and activations pass Core AI's operators: the model
        is for inference and conversion. For torch, the model is handed over as it is, with its simulators.
        Where this fails, the model is as it was.

        Args:
            model: the prepared model, or a copy of it; None for the quantizer's own.
            backend: ``ExportBackend.CoreAI`` or ``ExportBackend.Torch``; Core ML is not available.
            mmap_dir: for Core AI: a folder, empty or not there, to which weights are written, one file each,
                and from which they are mapped into memory. Keep the files as long as the model lives.

        Raises:
            RuntimeError: the model is not prepared, or has observed nothing.
            NotImplementedError: the backend is not available, or lacks a dtype or parameters that depend on
                the input.
            ValueError: there is no such backend; it cannot express a dtype with its granularity; or
                ``mmap_dir`` is given for another than Core AI, or for a model that is not on the CPU.
            ImportError: the backend's package is not installed.
            NotADirectoryError, FileExistsError: ``mmap_dir`` is a file, or has files in it.
        """
        model = self._require_prepared(model, "finalize")
        if mmap_dir is not None and backend != ExportBackend.CoreAI:
            raise ValueError(f"mmap_dir is for ExportBackend.CoreAI only; got backend={backend}")
        if backend == ExportBackend.CoreAI:
            finalize_eager(model, ExportBackend.CoreAI, mmap_dir)
            setattr(model, PREPARED_BY_QUANTIZER, False)
            return model
        self._require_torch(backend)
        return model


def _refuse_meta(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(
                f"{name!r} is on the meta device and has no values to observe. Give the model its parameters "
                f"first: model.to_empty(device=...) and load_state_dict, or load_state_dict(assign=True)."
            )
