"""Calls that one would not make. Whether they are refused, and with which exception, must be the same."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .valid_calls import api, block, channel, repeated_key, simulator, spec, step

__all__ = ["INVALID"]


def of(granularity: Any) -> Any:
    return simulator(granularity=granularity)


def dynamic() -> Any:
    return simulator("activation", qparam_calculator_cls="dynamic")


fp8 = {"dtype": "float8_e4m3fn"}

INVALID: dict[str, Callable[[], Any]] = {
    "dtype unknown": lambda: spec(dtype="foo"),
    "dtype not a dtype": lambda: spec(dtype=3),
    "dtype unsupported": lambda: spec(dtype=torch.int16),
    "dtype uint3": lambda: spec(dtype="uint3"),
    "dtype float16": lambda: spec(dtype=torch.float16),
    "dtype None": lambda: spec(dtype=None),
    "scheme unknown": lambda: spec(qscheme="x"),
    "scheme None": lambda: spec(qscheme=None),
    "formulation unknown": lambda: spec(qformulation="q"),
    "granularity number": lambda: spec(granularity=3),
    "granularity string": lambda: spec(granularity="per_tensor"),
    "granularity dict without type": lambda: spec(granularity={"per_channel": {"axis": 0}}),
    "granularity dict with unknown type": lambda: spec(granularity={"type": "per_row"}),
    "granularity dict with bad field": lambda: spec(granularity={"type": "per_tensor", "axis": 0}),
    "granularity dict with extra field": lambda: spec(granularity={"type": "per_tensor", "more": 1}),
    "dynamic weights": lambda: simulator("weight", qparam_calculator_cls="dynamic"),
    "fp8 asymmetric": lambda: spec(**fp8, qscheme="asymmetric"),
    "fp8 with clipping": lambda: spec(**fp8, qscheme="symmetric_with_clipping"),
    "fp8 minval": lambda: spec(**fp8, qformulation="minval"),
    "fp4 asymmetric": lambda: spec(dtype="float4_e2m1fn", qscheme="asymmetric"),
    "calculator unknown": lambda: spec(qparam_calculator_cls="x"),
    "calculator of another kind": lambda: spec(qparam_calculator_cls=torch.nn.Linear),
    "calculator number": lambda: spec(qparam_calculator_cls=1),
    "range calculator unknown": lambda: spec(range_calculator_cls="x"),
    "fake quantizer unknown": lambda: spec(fake_quantize_cls="x"),
    "float_range reversed": lambda: spec(float_range=[1, -1]),
    "float_range equal": lambda: spec(float_range=[0, 0]),
    "float_range without zero": lambda: spec(float_range=[0.5, 1]),
    "float_range negative": lambda: spec(float_range=[-2, -1]),
    "float_range max below zero": lambda: spec(float_range=[None, -1]),
    "float_range too short": lambda: spec(float_range=[1]),
    "float_range too long": lambda: spec(float_range=[-1, 0, 1]),
    "float_range None": lambda: spec(float_range=None),
    "float_range string": lambda: spec(float_range=[-1, "a"]),
    "float_range NaN": lambda: spec(float_range=[math.nan, 1]).float_range,
    "scale_dtype float16": lambda: spec(scale_dtype=torch.float16),
    "scale_dtype unknown": lambda: spec(scale_dtype="x"),
    "scale_dtype e8m0 of int6": lambda: spec(dtype="int6", scale_dtype=torch.float8_e8m0fnu),
    "scale_dtype e8m0 of uint8": lambda: spec(dtype="uint8", scale_dtype=torch.float8_e8m0fnu),
    "scale_dtype e8m0 of int4, asymmetric": lambda: spec(
        dtype="int4", scale_dtype=torch.float8_e8m0fnu, qscheme="asymmetric"
    ),
    "extension int5": lambda: spec(dtype="int5"),
    "extension nvfp4": lambda: spec(dtype="float4_e2m1fn", scale_dtype="float8_e4m3fn"),
    "mxint8 asymmetric": lambda: spec(scale_dtype=torch.float8_e8m0fnu, qscheme="asymmetric"),
    "mxint8 with clipping": lambda: spec(scale_dtype=torch.float8_e8m0fnu, qscheme="symmetric_with_clipping"),
    "mxint8 minval": lambda: spec(scale_dtype=torch.float8_e8m0fnu, qformulation="minval"),
    "scale_dtype float32 of fp4": lambda: spec(dtype="float4_e2m1fn", scale_dtype=torch.float32),
    "spec frozen": lambda: setattr(spec(), "dtype", torch.int8),
    "spec positional": lambda: api.QuantizationSpec(torch.int8),
    "channel axis string": lambda: channel(axis="a"),
    "channel axis fraction": lambda: channel(axis=1.5),
    "channel axis tuple": lambda: channel(axis=(0, 1)),
    "channel extra field": lambda: repr(channel(axis=0, block_size=4)),
    "tensor axis": lambda: api.PerTensorGranularity(axis=0),
    "block without size": lambda: block(),
    "block without size, with axis": lambda: block(axis=0),
    "block of zero": lambda: block(axis=0, block_size=0),
    "block of -1": lambda: block(axis=0, block_size=-1),
    "block of tuple with zero": lambda: block(block_size=(0, 4)),
    "block of tuple with -2": lambda: block(block_size=(-2, 4)),
    "block of fraction": lambda: block(axis=0, block_size=2.5),
    "block axis tuple": lambda: block(axis=(0, 1), block_size=4),
    "block axis and tuple": lambda: repr(block(axis=0, block_size=(4, 4))),
    "block axis and tuple, used": lambda: of(block(axis=0, block_size=(4, 4)))(torch.ones(4, 4)),
    "block empty tuple, used": lambda: of(block(block_size=()))(torch.ones(4, 4)),
    "block rank": lambda: of(block(block_size=(1, 1, 1)))(torch.ones(2, 2)),
    "channel axis out of range": lambda: of(channel(axis=3))(torch.ones(2, 2)),
    "channel axis out of range below": lambda: of(channel(axis=-3))(torch.ones(2, 2)),
    "block axis out of range": lambda: of(block(axis=3, block_size=1))(torch.ones(2, 2)),
    "resolve_block_sizes indivisible": lambda: api.resolve_block_sizes((4, 8), (4, 3)),
    "resolve_block_sizes rank": lambda: api.resolve_block_sizes((4, 8), (4,)),
    "resolve_block_sizes zero": lambda: api.resolve_block_sizes((4, 8), (0, 4)),
    "resolve_block_sizes number": lambda: api.resolve_block_sizes((4, 8), 4),
    "registry key, granularity": lambda: api.QuantizationGranularity.get_class("x"),
    "registry key, calculator": lambda: api.QParamsCalculatorBase.get_class("x"),
    "registry key, fake quantizer": lambda: api.FakeQuantizeImplBase.get_class("x"),
    "registry resolve number": lambda: api.QParamsCalculatorBase.resolve(3),
    "registry resolve unregistered": lambda: api.QParamsCalculatorBase.resolve(torch.nn.Linear),
    "registry repeated key": repeated_key,
    "target None": lambda: api.QuantizationComponentFactory.construct(spec(), None),
    "target string": lambda: api.QuantizationComponentFactory.construct(spec(), "weight"),
    "spec None": lambda: api.QuantizationComponentFactory.construct(None, api.CompressionTargetTensor.WEIGHT),
    "abstract fake quantizer": lambda: api.FakeQuantizeImplBase(),
    "abstract calculator": lambda: api.QParamsCalculatorBase(),
    "scheme value": lambda: api.QuantizationScheme("x"),
    "input string": lambda: simulator()("a"),
    "input complex": lambda: simulator()(torch.ones(2, dtype=torch.complex64)),
    "input bool": lambda: simulator()(torch.ones(2, dtype=torch.bool)),
    "input integers": lambda: simulator()(torch.arange(6).reshape(2, 3)),
    "input empty, per tensor": lambda: simulator()(torch.empty(0, 4)),
    "input empty, per tensor, 1-D": lambda: simulator("activation")(torch.empty(0)),
    "input empty, blocks along the empty axis": lambda: of(channel(axis=0))(torch.empty(0, 4)),
    "input empty, blocks along another axis": lambda: of(channel(axis=1))(torch.empty(0, 4)),
    "input empty, blocks within the empty axis": lambda: of(block(axis=0, block_size=2))(torch.empty(0, 4)),
    "state of a stepped simulator into a fresh one": lambda: [
        simulator().load_state_dict(step(simulator(), torch.ones(2, 3))["state"]),
    ][:0],
    "observer off before any step": lambda: [
        (module := simulator()).disable_observer(),
        module(torch.ones(2)),
    ],
    "stateless observer switches": lambda: [
        (module := dynamic()).disable_observer(),
        module.observer_enabled.clone(),
        module.enable_observer(False),
        module.observer_enabled.clone(),
    ],
    "running shape change": lambda: [
        module := simulator("activation", granularity=channel(axis=0)),
        module(torch.ones(3, 4)),
        module(torch.ones(5, 4)),
    ][:0],
    "qparams before any step": lambda: simulator().calculate_qparams(),
    "dynamic qparams": lambda: dynamic().calculate_qparams(),
    "dynamic export mode": lambda: dynamic().set_export_mode(True),
    "state dict with missing keys": lambda: simulator().load_state_dict({}, strict=True),
}
