"""Two processes that see other data, and end with the same ranges."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig


def prepared(calculator):
    torch.manual_seed(0)
    spec = QuantizationSpec(qparam_calculator_cls=calculator)
    config = ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec=None, op_state_spec=None)
    quantizer = Quantizer(
        nn.Sequential(nn.Linear(4, 4)), QuantizerConfig(global_config=config, execution_mode="eager")
    )
    return quantizer, quantizer.prepare((torch.ones(2, 4),))


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for calculator in ("moving_average", "global_minmax"):
        quantizer, model = prepared(calculator)
        with quantizer.calibration_mode(sync_ranges=True):
            model(torch.full((2, 4), [-3.0, 5.0][rank]))
        calculated = model[0].linear_quantize_input.qparams_calculator
        found[calculator] = {name: value.clone() for name, value in calculated.state_dict().items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_end_with_the_same_ranges(tmp_path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for calculator, state in first.items():
        assert all(torch.equal(value, second[calculator][name]) for name, value in state.items())
    ends = {name: (float(each["running_min"]), float(each["running_max"])) for name, each in first.items()}
    assert ends["global_minmax"] == (-3.0, 5.0)
    # Averages of 0.01 of the new and 0.99 of the range (0, 1) before: (-0.03, 0.99) and (0, 1.04).
    assert ends["moving_average"] == pytest.approx((-0.015, 1.015))
    # The parameters are those of the range: of one process that has seen all of it.
    quantizer, model = prepared("global_minmax")
    with quantizer.calibration_mode():
        model(torch.full((2, 4), -3.0))
        model(torch.full((2, 4), 5.0))
    alone = model[0].linear_quantize_input.qparams_calculator
    assert torch.equal(alone.scale, first["global_minmax"]["scale"])


def test_without_a_process_group():
    quantizer, _ = prepared("moving_average")
    with pytest.raises(RuntimeError, match="needs a process group"):
        quantizer.sync_ranges()
