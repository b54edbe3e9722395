"""One fake quantizer, and what is made when it is first used, between threads: with a GIL and without."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from coreai_kernels import native
from coreai_kernels.runtime import fast_path_counts, reset_fast_path_counts
from tests.threads import together

THREADS = 4
# Inputs of more kinds than calls are captured for.
SHAPES = [(rows, 8) for rows in range(1, 21)]


@pytest.fixture(autouse=True)
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def settled(make_activation):
    """A fake quantizer whose parameters stand still, inputs, and its outputs."""
    module = make_activation()
    module(torch.linspace(-3, 3, 160).view(20, 8))
    module.disable_observer()
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) for shape in SHAPES]
    return module, inputs, [module(x) for x in inputs]


def test_switches_thrown_while_others_call(settled):
    module, inputs, outputs = settled
    others = THREADS - 1
    done = threading.Semaphore(0)

    def call():
        try:
            for turn in range(600):
                x, wanted = inputs[turn % len(SHAPES)], outputs[turn % len(SHAPES)]
                found = module(x)
                assert torch.equal(found, wanted) or torch.equal(found, x)
        finally:
            done.release()

    def throw():
        on, left = True, others
        while left:
            on = not on
            module.enable_fake_quant(on)
            for x, output in zip(inputs[:3], outputs, strict=False):
                assert torch.equal(module(x), output if on else x)
            left -= done.acquire(blocking=False)
        module.enable_fake_quant()

    together(throw, *[call] * others)
    for x, output in zip(inputs, outputs, strict=True):
        assert torch.equal(module(x), output)


def test_hooks_and_settings_that_change_while_others_call(settled):
    module, inputs, outputs = settled
    calculator = module.qparams_calculator

    def call():
        for turn in range(600):
            assert torch.equal(module(inputs[turn % len(SHAPES)]), outputs[turn % len(SHAPES)])

    def change():
        for _ in range(300):
            handle = calculator.register_forward_hook(lambda *_: None)
            module.quant_max = module.quant_max  # begins a new generation
            calculator.scale = calculator.scale.clone()
            handle.remove()

    together(change, *[call] * (THREADS - 1))


@pytest.mark.skipif(native.autograd is None, reason=f"no fast path: {native.autograd_missing}")
def test_no_hit_is_lost_in_the_counts(settled):
    module, inputs, _ = settled
    module(inputs[0])
    module(inputs[0])
    reset_fast_path_counts()

    def call():
        for _ in range(1000):
            module(inputs[0])

    together(*[call] * THREADS)
    assert fast_path_counts()["hits"] == 1000 * THREADS


FIRST_USE = """
import sys, threading
import torch
begin, outputs, errors = threading.Barrier(4), [], []
sys.setswitchinterval(1e-5)

def use(index):
    try:
        begin.wait()
        import coreai_opt
        from coreai_opt.quantization import Quantizer, QuantizerConfig
        weight = torch.linspace(-1, 1, 256).view(16, 16)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
        with torch.no_grad():
            model[0].weight.copy_(weight)
            model[0].bias.zero_()
        x = torch.linspace(-2, 2, 64).view(4, 16)
        config = QuantizerConfig()
        config.set_execution_mode("eager")  # torch.export is for one thread at a time
        quantizer = Quantizer(model, config)
        model = quantizer.prepare((x,))
        output = model(x)
        output.sum().backward()
        outputs.append([output.detach(), *(p.grad for p in model.parameters())])
    except BaseException as error:
        errors.append(error)
        raise

threads = [threading.Thread(target=use, args=(index,)) for index in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
for other in outputs[1:]:
    for one, first in zip(other, outputs[0], strict=True):
        assert torch.equal(one, first)
print("the same", len(outputs))
"""


def test_first_use_in_several_threads():
    """Imports, operators, tables and environment are read and made when first used."""
    root = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST_USE],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "the same 4" in result.stdout
