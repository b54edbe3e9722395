"""torch.export, and torchao's graph transformations."""

import pytest
import torch

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase


@pytest.mark.parametrize(
    "fields",
    [
        {"qscheme": "asymmetric"},
        {"qformulation": "minval", "granularity": PerBlockGranularity(axis=1, block_size=4), "dtype": "int4"},
        {"dtype": "float8_e4m3fn", "granularity": PerChannelGranularity(axis=0)},
        {"dtype": "float4_e2m1fn"},
    ],
)
def test_an_exported_program_has_torch_operators_only(make, x, fields):
    module = make(**fields)
    y = module(x)
    module.set_export_mode()
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), y)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("coreai_kernels" in name for name in operators)


def test_the_quantizers_survive_convert_pt2e(x):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        Quantizer,
    )
    from torchao.quantization.pt2e.quantizer import (
        QuantizationSpec as Annotated,
    )

    def spec(target, **fields):
        made = QuantizationComponentFactory.construct_partial(QuantizationSpec(**fields), target)
        return Annotated(dtype=torch.int8, observer_or_fake_quant_ctr=made, quant_min=-128, quant_max=127)

    class Annotate(Quantizer):
        def annotate(self, model):
            for node in model.graph.nodes:
                if node.target is torch.ops.aten.linear.default:
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={
                            node.args[0]: spec(CompressionTargetTensor.ACTIVATION),
                            node.args[1]: spec(CompressionTargetTensor.WEIGHT, dtype="int4"),
                        },
                        _annotated=True,
                    )
            return model

        def validate(self, model):
            pass

    model = torch.nn.Linear(8, 8)
    prepared = prepare_qat_pt2e(torch.export.export(model, (x,)).module(), Annotate())
    expected = prepared(x)
    assert sum(isinstance(module, FakeQuantizeImplBase) for module in prepared.modules()) == 2
    converted = convert_pt2e(prepared)
    quantizers = [module for module in converted.modules() if isinstance(module, FakeQuantizeImplBase)]
    assert len(quantizers) == 2
    for quantizer in quantizers:
        quantizer.disable_observer()
    torch.testing.assert_close(converted(x), expected)
