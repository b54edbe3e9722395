"""Models that have quantizers already: finalized for torch, and prepared again."""

from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import QuantizationSpec, Quantizer, QuantizerConfig

from .support import Function, asymmetric, flags, mlp, only, prepared, simulators, x


def finalized(model: nn.Module, *inputs: torch.Tensor, config: QuantizerConfig | None = None) -> Any:
    quantizer, found = prepared(model, *inputs, config=config)
    with quantizer.calibration_mode():
        found(*(3 * each for each in inputs))
    return quantizer.finalize(backend=ExportBackend.Torch)


def operators(model: Any) -> list[str]:
    return [str(node.target) for node in model.graph.nodes if node.op not in ("placeholder", "output")]


def test_a_finalized_graph_is_prepared_again_as_the_model_was() -> None:
    first = prepared(mlp(), x(2, 4))[1]
    final = finalized(mlp(), x(2, 4))
    ranges = {name: each.calculate_qparams() for name, each in simulators(final).items()}
    expected = final(x(2, 4))
    quantizer, found = prepared(final, x(2, 4))
    assert operators(found) == operators(first)
    assert list(found.state_dict()) == list(first.state_dict())
    for name, (scale, offset, _) in ranges.items():  # not those of the example inputs
        assert torch.equal(simulators(found)[name].calculate_qparams()[0], scale)
        assert torch.equal(simulators(found)[name].calculate_qparams()[1], offset)
    assert set(flags(found).values()) == {(False, True)}
    torch.testing.assert_close(found(x(2, 4)), expected, rtol=0, atol=0.05)
    with quantizer.training_mode():
        assert set(flags(found).values()) == {(True, True)}
        found(x(2, 4)).sum().backward()
    assert final.get_parameter("0.weight").grad is not None
    again: Any = quantizer.finalize(backend=ExportBackend.Torch)
    assert operators(again) == operators(final)


def test_earlier_quantizers_stay_whatever_the_configuration_says() -> None:
    final = finalized(
        mlp(), x(2, 4), config=QuantizerConfig(global_config=only(op_input_spec={"*": asymmetric()}))
    )
    assert len(simulators(final)) == 2
    weights = only(op_state_spec={"weight": QuantizationSpec()}, op_input_spec={"*": QuantizationSpec()})
    _, found = prepared(final, x(2, 4), config=QuantizerConfig(global_config=weights))
    of_activations = [
        each
        for each in simulators(found).values()
        if each.quantization_target is CompressionTargetTensor.ACTIVATION
    ]
    assert len(simulators(found)) == 4
    assert [each.qscheme for each in of_activations] == [each.qscheme for each in simulators(final).values()]


def test_shared_and_parallel_quantizers() -> None:
    model = Function(
        lambda m, t: torch.cat([torch.relu(m.a(t)), torch.sigmoid(m.b(t))], 1).view(-1),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
    )
    first = prepared(model, x(2, 4))[1]
    final = finalized(model, x(2, 4))
    found = prepared(final, x(2, 4))[1]
    assert len(set(simulators(found).values())) == len(set(simulators(first).values()))
    assert sorted(operators(found)) == sorted(operators(first))


def test_a_failure_leaves_them_as_they_were() -> None:
    final = finalized(mlp(), x(2, 4))
    expected, before = final(x(2, 4)), flags(final)
    with pytest.raises(RuntimeError, match="state_dict"):
        Quantizer(final).prepare((x(2, 4),), state_dict={})
    with pytest.raises(RuntimeError, match="export"):
        Quantizer(final).prepare((x(2, 5),))
    assert flags(final) == before
    assert torch.equal(final(x(2, 4)), expected)
    assert not [each for each in simulators(final).values() if "forward" in vars(each)]
