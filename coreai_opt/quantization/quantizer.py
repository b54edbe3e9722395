"""The quantizer: whole models."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from coreai_opt import _prepared_models
from coreai_opt._call_inputs import Arguments
from coreai_opt._restoring import undone_on_failure
from coreai_opt._state_tensors import refuse_meta
from coreai_opt.common import ExportBackend
from coreai_opt.quantization._eager import preparation
from coreai_opt.quantization._eager.operations import MODULES, OPERATIONS
from coreai_opt.quantization._eager.preparation import simulators_of
from coreai_opt.quantization._eager.resolution import check_positions
from coreai_opt.quantization._export import finalize_eager
from coreai_opt.quantization._export_graph import finalize_graph
from coreai_opt.quantization._export_tensors import (
    eager_tensors,
    graph_tensors,
    put_eager_tensors,
    put_graph_tensors,
)
from coreai_opt.quantization._graph import preparation as graph_preparation
from coreai_opt.quantization._graph.configs import check_keys
from coreai_opt.quantization._graph.finalize import finalized_copy, fold_weights
from coreai_opt.quantization._graph.owners import quantizers_in, schedules_of
from coreai_opt.quantization.base_quantizer import _BaseQuantizer
from coreai_opt.quantization.config import ExecutionMode, QATSchedule, QuantizerConfig
from coreai_opt.quantization.post_training.calibration import CalibrationMixin
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["Quantizer"]


class Quantizer(CalibrationMixin, _BaseQuantizer):
    """Quantizes a model: first in simulation, so that it can be calibrated or trained.

    In graph mode, the default, :func:`torch.export.export` makes a graph of the model, and simulators are put
    into the graph: what is prepared is a :class:`torch.fx.GraphModule`, which shares its parameters with the
    model. In eager mode the model itself is changed. See docs/execution-modes.md.

    In eager mode weights are simulated where modules read them, activations where operations (linear,
    convolutions, embedding, matmul, add, sub, mul, max_pool2d, adaptive_avg_pool2d) receive and return them,
    in whichever module's forward these are called. See :class:`~coreai_opt.quantization.QuantizerConfig`.

    Where a specification leaves the axis of a weight open, channels are those of the output (axis 0; 1 for
    transposed convolutions), and blocks lie along the input (axis 1; 0 for transposed convolutions).

    Args:
        model: in eager mode, is changed in place.
        config: which tensors, and how; in which execution mode.
        strict_upstream: in graph mode, give batch norms and dropouts the numbers that Apple's package gives
            them (eps 1e-5, momentum 0.1, p 0.5) instead of the model's own.
    """

    _supported_modules = MODULES

    def __init__(
        self, model: nn.Module, config: QuantizerConfig | None = None, *, strict_upstream: bool = False
    ) -> None:
        super().__init__(model, config)
        self._strict_upstream = strict_upstream
        # In graph mode: schedules by the names of the modules of the model that was exported.
        self._module_schedules: dict[str, QATSchedule] = {}
        # In graph mode: arguments of prepare.
        self._options: dict[str, Any] = {}
        eager = self._config.execution_mode is ExecutionMode.EAGER
        if eager and self._config.preserved_attributes is not None:
            warnings.warn("preserved_attributes has no effect in eager mode", UserWarning, stacklevel=2)
        if eager:
            check_positions(self._config)
        else:
            check_keys(self._config)

    def prepare(
        self,
        example_inputs: tuple[Any, ...] | Mapping[str, Any],
        dynamic_shapes: Any = None,
        export_with_no_grad: bool = True,
        *,
        state_dict: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Put simulators on the model, let them observe ``example_inputs``, and return what is prepared.

        The model runs in evaluation mode and without gradients. Afterwards simulators are on and observe
        nothing: see :meth:`calibration_mode` and :meth:`training_mode`. If anything fails, the model is as
        before.

        Args:
            example_inputs: the model's positional arguments; or a mapping of keyword arguments.
            dynamic_shapes: for :func:`torch.export.export`; no effect in eager mode, where all shapes are
                dynamic.
            export_with_no_grad: export under :class:`torch.no_grad`; no effect in eager mode.
            state_dict: the state of a model that was prepared with the same configuration. It is loaded
                strictly, and takes the place of what was observed.

        Raises:
            NotImplementedError: the configuration names tensors of operations by other than positions.
            TypeError: ``example_inputs`` is neither a tuple nor a mapping.
            RuntimeError: the model is prepared already; parameters are on the meta device; ``state_dict``
                does not fit the prepared model, or lacks the state of some simulator; in graph mode also:
                torch cannot export the model, or another compressor has prepared it.
            ValueError: ``example_inputs`` are empty tensors; a granularity leaves its axis open where there
                is no default; in graph mode also: there are no inputs, or a cache is configured that the
                model does not have.
        """
        in_graph_mode = self._config.execution_mode is ExecutionMode.GRAPH
        self._require_unprepared()
        refuse_meta(self._model)
        if in_graph_mode:
            return self._prepare_graph(example_inputs, dynamic_shapes, export_with_no_grad, state_dict)
        if dynamic_shapes is not None:
            warnings.warn("dynamic_shapes has no effect in eager mode", UserWarning, stacklevel=2)
        if not export_with_no_grad:
            warnings.warn("export_with_no_grad has no effect in eager mode", UserWarning, stacklevel=2)
        with self._given(example_inputs) as args, undone_on_failure(self._model):
            self._left_out = preparation.prepare(self._model, self._config, args)
            if state_dict is not None:
                self._load_prepared_state_dict(self._model, state_dict)
                preparation.set_flags(simulators_of(self._model), observe=False, simulate=True)
        self._mark_prepared(self._model, state_dict)
        return self._model

    def _prepare_graph(
        self,
        example_inputs: Any,
        dynamic_shapes: Any,
        export_with_no_grad: bool,
        state_dict: Mapping[str, Any] | None,
    ) -> nn.Module:
        others = ", ".join(_prepared_models.preparations_of(self._model))
        if others:
            raise RuntimeError(
                f"prepare: the model is prepared for {others} already, and graph mode would quantize what "
                f"simulates that. Finalize it first, with backend='torch'; or use execution_mode='eager'"
            )
        arguments = self._arguments(example_inputs)
        if not isinstance(arguments.args, tuple):
            raise TypeError(
                f"example_inputs must be a tuple of the model's positional arguments, e.g. (images,); "
                f"got {type(arguments.args).__name__}"
            )
        if not arguments.args and not arguments.kwargs:
            raise ValueError("example_inputs is empty: graph mode exports the model with its inputs")
        schedules = self._schedules_by_module()
        left_out: dict[str, str] = {}
        with self._explaining(arguments):
            self._model = graph_preparation.prepare(
                self._model,
                self._config,
                arguments,
                dynamic_shapes,
                export_with_no_grad,
                state_dict,
                strict_upstream=self._strict_upstream,
                left_out=left_out,
            )
        self._left_out = left_out
        self._module_schedules = schedules
        self._options = {"dynamic_shapes": dynamic_shapes, "export_with_no_grad": export_with_no_grad}
        self._mark_prepared(self._model, state_dict)
        return self._model

    def _arguments(self, example_inputs: Any) -> Arguments:
        arguments = super()._arguments(example_inputs)
        tensors = [
            each for each in tree_leaves((arguments.args, arguments.kwargs)) if isinstance(each, Tensor)
        ]
        if tensors and not any(each.numel() for each in tensors):
            shapes = ", ".join(str(tuple(each.shape)) for each in tensors)
            raise ValueError(
                f"example_inputs must hold elements, for activations to have ranges; got shapes {shapes}"
            )
        return arguments

    def _preparation_options(self) -> dict[str, Any]:
        return {**self._options, "strict_upstream": self._strict_upstream} if self._options else {}

    def finalize(
        self,
        model: nn.Module | None = None,
        backend: ExportBackend = ExportBackend.CoreAI,
        *,
        mmap_dir: Any = None,
        tensor_subclass: bool = False,
    ) -> nn.Module:
        """Make the quantized model of the prepared one.

        For Core AI, weights are held as they are stored, and activations pass Core AI's operators: the model
        is for inference and conversion; where this fails, it is as it was. In eager mode the prepared model
        itself is changed; for torch, the quantized values are written into the weights' parameters from
        before :meth:`prepare`, and simulators of activations stay, and work as before.

        In graph mode the result is a graph module of its own, without the batch norms behind convolutions;
        for torch, it has simulated weights. What is left it shares with the prepared one.

        For Core ML, weights stay dense, with simulated values, and metadata beside them tell the converter
        how they are compressed.

        Args:
            model: the prepared model, or a copy of it; None for the quantizer's own.
            backend: ``ExportBackend.CoreAI``, ``ExportBackend.CoreML`` or ``ExportBackend.Torch``.
            mmap_dir: for Core AI: a folder, empty or not there, to which weights are written, one file each,
                and from which they are mapped into memory. Keep the files as long as the model lives.
            tensor_subclass: for torch: weights stay quantized, as torchao's tensors, and are for inference.

        Raises:
            RuntimeError: the model is not prepared, or has observed nothing.
            NotImplementedError: the backend lacks a dtype, or parameters that depend on the input.
            CoreMLExportError: Core ML cannot express a tensor's quantization.
            ValueError: there is no such backend; it cannot express a dtype with its granularity (in graph
                mode the cause of a RuntimeError); or ``mmap_dir`` is given for another than Core AI, or for a
                model that is not on the CPU; ``tensor_subclass`` is given for another than torch, or torchao
                has no tensor for a weight; in graph mode also: nothing is quantized.
            ImportError: the backend's package is not installed.
            NotADirectoryError, FileExistsError: ``mmap_dir`` is a file, or has files in it.
        """
        model = self._require_prepared(model, "finalize")
        if mmap_dir is not None and backend != ExportBackend.CoreAI:
            raise ValueError(f"mmap_dir is for ExportBackend.CoreAI only; got backend={backend}")
        if tensor_subclass and backend != ExportBackend.Torch:
            raise ValueError(f"tensor_subclass is for ExportBackend.Torch only; got backend={backend}")
        if isinstance(model, GraphModule):
            if backend in (ExportBackend.CoreAI, ExportBackend.CoreML):
                caches = self._config.kv_cache_quant_configs
                return finalize_graph(model, ExportBackend(backend), mmap_dir, caches)
            self._require_torch(backend)
            result = finalized_copy(model)
            tensors = graph_tensors(result) if tensor_subclass else {}
            fold_weights(result)
            put_graph_tensors(result, tensors)
            return result
        if backend in (ExportBackend.CoreAI, ExportBackend.CoreML):
            finalize_eager(model, ExportBackend(backend), mmap_dir)
            self._mark_finalized(model)
            return model
        self._require_torch(backend)
        parameters = eager_tensors(model) if tensor_subclass else []
        self._finalize_for_torch(model)
        put_eager_tensors(parameters)
        return model

    def _mark_finalized(self, model: nn.Module) -> None:
        simulates = next(simulators_of(model), None) is not None
        _prepared_models.mark_finalized(model, self._kind, simulates)

    def _known_op_types(self) -> Iterable[str] | None:
        return OPERATIONS if self._config.execution_mode is ExecutionMode.EAGER else None

    def _schedules_by_module(self) -> dict[str, QATSchedule]:
        if not self._has_schedule():
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of patterns without a match: prepare gives them
            levels = self._config.build_module_config_dict(self._model)
        entries = {name: entry for level in levels.values() for name, entry in level.items()}
        return {name: entry.qat_schedule for name, entry in entries.items() if entry.qat_schedule is not None}

    def _schedules(self, model: nn.Module) -> Mapping[FakeQuantizeImplBase, QATSchedule | None]:
        if isinstance(model, GraphModule):
            return schedules_of(model, self._module_schedules)
        return super()._schedules(model)

    def _simulators_in(self, module: Any) -> Iterator[FakeQuantizeImplBase]:
        if not isinstance(self._model, GraphModule):
            return super()._simulators_in(module)
        self._require_no_schedule()
        return simulators_of(self._model) if module is None else quantizers_in(self._model, module)

    def _require_prepared(self, model: nn.Module | None, action: str) -> nn.Module:
        in_graph_mode = self._config.execution_mode is ExecutionMode.GRAPH
        if in_graph_mode and model is not None and not isinstance(model, GraphModule):
            raise TypeError(
                f"{action}: in graph mode, model must be the torch.fx.GraphModule that prepare() returned, "
                f"or a copy of it; got {type(model).__name__}"
            )
        chosen = super()._require_prepared(model, action)
        if in_graph_mode:
            self._model = chosen
        return chosen
