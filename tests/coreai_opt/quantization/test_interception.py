"""What happens to tensors in intercepted forwards."""

import copy
import gc
import inspect
import pickle
import threading
import weakref
from contextlib import ExitStack
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coreai_kernels import use_backend
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer
from coreai_opt.quantization._eager.interception import is_intercepting

from .support import OFF, WEIGHTS_ONLY, Mlp, Outer, Residual, eager, globally, prepared, simulators, slots

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
ACTIVATIONS_ONLY = {"op_state_spec": None}
SPEC = QuantizationSpec(dtype="int4")


def test_operands_and_results_pass_their_simulators() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.matmul(other=y, input=x)

    y = torch.randn(8, 3)
    _, model = prepared(Product(), X, y)
    expected = model.matmul_quantize_output_0(model.matmul_quantize_input(X) @ model.matmul_quantize_other(y))
    assert torch.equal(model(X, y), expected)


def test_modules_of_one_operation_need_no_interception() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_intercepting())
            return x

    _, model = prepared(nn.Sequential(nn.Linear(8, 8), Probe()), X)
    expected = model[0].linear_quantize_output_0(
        F.linear(model[0].linear_quantize_input(X), model[0].weight, model[0].bias)
    )
    assert torch.equal(model(X), expected)
    assert not any(seen)


def test_in_place_operations_write_their_result() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y.mul_(2.0)
            return y

    _, model = prepared(InPlace(), X)
    expected = model.mul__quantize_output_0(model.mul__quantize_input(X) * 2)
    assert torch.equal(model(X), expected)


def test_calls_are_recognised_by_their_place_in_the_source() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor, times: int = 2, first: bool = True) -> Tensor:
            if first:
                x = x * 3
            for _ in range(times):
                x = x * 2
            return x

    _, model = prepared(Loop(), X)
    outputs = (model.mul_quantize_output_0, model.mul_1_quantize_output_0, model.mul_2_quantize_output_0)
    inputs = (model.mul_quantize_input, model.mul_1_quantize_input, model.mul_2_quantize_input)

    def expected(times: int, first: bool) -> Tensor:
        x = X
        if first:
            x = outputs[0](inputs[0](x) * 3)
        for index in range(times):
            x = outputs[min(index, 1) + 1](inputs[min(index, 1) + 1](x) * 2)
        return x

    for times in range(5):
        for first in (True, False):
            assert torch.equal(model(X, times, first), expected(times, first)), (times, first)


def test_calls_at_unknown_places_are_recognised_by_their_order() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor, branch: int = 0) -> Tensor:
            if branch == 0:
                return x * 2 * 3
            if branch == 1:
                return x * 3 * 2
            return x * 5

    _, model = prepared(Branches(), X)
    first = model.mul_quantize_output_0(model.mul_quantize_input(X) * 3)
    assert torch.equal(model(X, 1), model.mul_1_quantize_output_0(model.mul_1_quantize_input(first) * 2))
    with pytest.raises(RuntimeError, match="called 'mul' 1 times; when it was prepared, 2 times"):
        model(X, 2)
    assert not is_intercepting()
    assert model(X).shape == X.shape


def test_compiled_code_recognises_calls_by_their_order() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor, times: int = 2) -> Tensor:
            for _ in range(times):
                x = x * 2
            return x

    torch._dynamo.reset()
    _, model = prepared(Loop(), X)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(X), model(X))
    with pytest.raises(RuntimeError, match="called 'mul' 3 times"):
        compiled(X, 3)


def test_a_branch_that_was_not_taken_is_not_simulated() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            return x - 1 if other else x + 1

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Branch()

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            return self.branch(x, other) - 2

    _, model = prepared(Outside(), X, config=globally(op_input_spec=None))
    assert slots(model) == {"branch.add_quantize_output_0", "sub_quantize_output_0"}
    assert torch.equal(model(X, True), model.sub_quantize_output_0(X - 1 - 2))


def test_a_module_that_is_put_in_afterwards_does_not_count_for_the_one_outside() -> None:
    class Adapted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x * 0

    _, model = prepared(Residual(), X)
    expected = model(X)
    model.linear = Adapted(model.linear)
    assert torch.equal(model(X), expected)


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["first", "linear"], r=2)
    _, model = prepared(Outer(), X)
    expected = model(X)
    assert torch.equal(peft.get_peft_model(model, adapters)(X), expected)
    adapted = peft.get_peft_model(Outer(), adapters)
    _, adapted = prepared(adapted, X)
    with adapted.disable_adapter():
        assert adapted(X).shape == X.shape


def test_an_unprepared_submodule_does_not_count_for_the_one_outside() -> None:
    _, model = prepared(Outer(), X, config=eager(module_name_configs={"inner": None}))
    assert "sub_quantize_output_0" in slots(model)
    assert model(X).shape == X.shape


def test_a_submodule_alone_is_simulated() -> None:
    _, model = prepared(Outer(), X)
    inside = []
    model.inner.register_forward_hook(lambda module, args, result: inside.append(result))
    model(X)
    assert torch.equal(model.inner(X), inside[0])
    assert not torch.equal(model.inner.add_1_quantize_output_0(inside[0] * 1.01), inside[0])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_ends_the_interception(error) -> None:
    class Failing(Residual):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fail:
                raise error("stop")
            return super().forward(x)

    _, model = prepared(Failing(), X)
    before = model(X)
    model.fail = True
    with pytest.raises(error, match="stop"):
        model(X)
    assert not is_intercepting()
    model.fail = False
    assert torch.equal(model(X), before)


def test_threads_do_not_disturb_each_other() -> None:
    _, model = prepared(Outer(), X)
    expected = model(X)
    results = []

    def run() -> None:
        for _ in range(20):
            results.append(torch.equal(model(X), expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(results)


def test_modes_of_the_user_see_the_calls() -> None:
    class Seeing(TorchFunctionMode):
        names: tuple[str, ...] = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names += (getattr(func, "__name__", ""),)
            return func(*args, **(kwargs or {}))

    _, model = prepared(Residual(), X)
    expected = model(X)
    with Seeing() as seeing:
        assert torch.equal(model(X), expected)
    assert {"add", "mul", "linear"} <= set(seeing.names)


def test_a_copy_is_independent_and_quantizes() -> None:
    _, model = prepared(Outer(), X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), model(X))
    with torch.no_grad():
        other.inner.add_quantize_output_0.qparams_calculator.scale.mul_(4)
    assert not torch.equal(other(X), model(X))


def test_a_model_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        # torch's parametrizations have cycles of their own.
        _, model = prepared(Outer(), X, config=globally(**ACTIVATIONS_ONLY))
        model(X).sum().backward()
        alive = [weakref.ref(module) for module in model.modules()]
        del model, _
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_a_model_of_activations_can_be_pickled() -> None:
    _, model = prepared(Residual(), X, config=globally(**ACTIVATIONS_ONLY))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))


def test_the_signature_stays() -> None:
    before = inspect.signature(Outer().forward)
    _, model = prepared(Outer(), X)
    assert inspect.signature(model.forward) == before
    assert "self.last(self.act(self.inner(x)))" in inspect.getsource(model.forward)


def test_forwards_that_others_replaced_are_kept() -> None:
    model = Mlp()
    inner = model.first.forward
    model.first.forward = lambda x: inner(x) * 0
    _, model = prepared(model, X, config=globally(op_input_spec=None))
    assert torch.equal(model(X), model(X * 2))


def test_operations_inside_of_simulators_do_not_count() -> None:
    """The reference backend calls torch's add and mul, as Outer does."""
    quantizer, model = prepared(Outer(), X)
    with use_backend("reference"), quantizer.training_mode():
        expected = model(X)
        model(X).sum().backward()
    with quantizer.calibration_mode():
        model(X)
    with use_backend("reference"), quantizer.calibration_mode():
        model(X)
    assert expected.shape == X.shape


def test_lists_and_tuples_of_results() -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.chunk(x, 2, -1)
            values, _ = x.max(-1)
            return left, right, values

    boundary = ModuleQuantizerConfig(**OFF, module_output_spec={"*": None, 1: SPEC, 2: SPEC})
    _, model = prepared(nn.Sequential(Parts()), X, config=eager(module_type_configs={Parts: boundary}))
    assert slots(model) == {"0.chunk_quantize_output_1", "0.max_quantize_output_0"}
    left, right, values = model(X)
    assert torch.equal(left, X[:, :4])
    assert torch.equal(right, model[0].chunk_quantize_output_1(X[:, 4:]))
    assert torch.equal(values, model[0].max_quantize_output_0(X.max(-1).values))


def test_attention_is_not_taken_apart_and_takes_no_shortcut() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = X[None]
    _, model = prepared(layer, x)
    assert not any(slot.startswith("self_attn") for slot in slots(model))
    with torch.no_grad():
        without = model(x)
    assert torch.equal(without, model(x))


def test_weights_only_intercepts_nothing() -> None:
    _, model = prepared(Outer(), X, config=globally(**WEIGHTS_ONLY))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_modules_of_torch_that_call_no_simulated_operation_have_no_hooks() -> None:
    _, model = prepared(Outer(), X)
    assert model.inner._forward_hooks
    assert not model.act._forward_hooks


def test_batch_norms_count_their_batches_for_themselves() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().add_(1)
            return self.norm(x)

    quantizer, model = prepared(Normed(), X)
    assert "add__quantize_input" in slots(model)
    with quantizer.training_mode():
        model(X)
    assert model.norm.num_batches_tracked == 1


def test_a_forward_that_is_replaced_afterwards_keeps_the_simulators() -> None:
    """Libraries of kernels replace the forwards of modules."""
    _, model = prepared(Outer(), X)
    expected = model(X)
    model.last.forward = MethodType(lambda self, x: F.linear(x, self.weight, self.bias), model.last)
    model.inner.forward = MethodType(lambda self, x: Residual.forward(self, x), model.inner)
    model.forward = MethodType(Outer.forward, model)
    assert torch.equal(model(X), expected)


def test_a_hook_that_fails_before_the_forward_ends_no_other_one() -> None:
    _, model = prepared(Outer(), X)
    expected = model(X)

    def fail(*_) -> None:
        raise ValueError("stop")

    handle = model.inner.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ValueError, match="stop"):
        model(X)
    assert not is_intercepting()
    handle.remove()
    assert torch.equal(model(X), expected)


def test_what_a_keyboard_interrupt_leaves_is_not_taken_for_a_forward() -> None:
    class Interrupted(Residual):
        interrupt = False

        def forward(self, x: Tensor) -> Tensor:
            if self.interrupt:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Outer()
    model.inner = Interrupted()
    _, model = prepared(model, X)
    expected = model(X)
    model.inner.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        model(X)
    assert torch.equal(X + X, 2 * X)
    model.inner.interrupt = False
    assert torch.equal(model(X), expected)
    assert torch._C._len_torch_function_stack() == 0


def test_a_forward_that_is_called_directly_belongs_to_its_caller() -> None:
    class Direct(Outer):
        def forward(self, x: Tensor) -> Tensor:
            return self.last.forward(x)

    _, model = prepared(Direct(), X)
    assert {"linear_quantize_input", "linear_quantize_output_0"} <= slots(model)
    assert torch.equal(
        model(X),
        model.linear_quantize_output_0(
            F.linear(model.linear_quantize_input(X), model.last.weight, model.last.bias)
        ),
    )


class Operators(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Outer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        y = 2 * x
        y *= 3
        y -= x
        return (3 - y)[:, :4] + (1 + y - x) @ x.T


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(strict: bool) -> None:
    torch._dynamo.reset()
    quantizer, model = prepared(Operators(), X)
    program = torch.export.export(model, (X,), strict=strict)
    assert torch.equal(program.module()(X), model(X))
    quantizer.finalize(backend="torch")
    program = torch.export.export(model, (X,), strict=strict)
    assert torch.equal(program.module()(X), model(X))


@pytest.mark.parametrize("mode", ["autocast", "calibration", "training"])
def test_compiled_models_give_what_eager_ones_do(mode: str) -> None:
    torch._dynamo.reset()
    quantizer, model = prepared(Operators(), X)
    other = copy.deepcopy(model)
    twin = Quantizer(other, eager())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with ExitStack() as stack:
        if mode != "autocast":
            stack.enter_context(getattr(quantizer, f"{mode}_mode")())
            stack.enter_context(getattr(twin, f"{mode}_mode")())
        if mode != "calibration":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        for scale in (1, 3):
            assert torch.equal(compiled(scale * X), other(scale * X))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_graph_breaks() -> None:
    class Broken(Residual):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    torch._dynamo.reset()
    model = Outer()
    model.inner = Broken()
    _, model = prepared(model, X)
    expected = model(X)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(X), expected)
    assert torch.equal(compiled(X), expected)
    assert torch._C._len_torch_function_stack() == 0


def test_parts_that_are_compiled_by_themselves() -> None:
    torch._dynamo.reset()
    _, model = prepared(Outer(), X)
    expected = model(X)
    model.inner.compile(backend="aot_eager", fullgraph=True)
    model.last.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(model(X), expected)


def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate")
    _, model = prepared(Outer(), X)
    expected = model(X)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.last.bias.is_meta
    assert torch.equal(model(X), expected)


def test_the_wrapper_for_mixed_precision_can_be_taken_off() -> None:
    accelerate = pytest.importorskip("accelerate")
    _, model = prepared(Outer(), X)
    expected = model(X)
    states = accelerate.state.AcceleratorState  # of the process: a trainer may have been here before
    states._reset_state(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        wrapped = accelerator.prepare(model)
        assert wrapped(X).dtype == torch.float32
        assert torch.equal(accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)(X), expected)
    finally:
        states._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_padding_comes_before_the_operation(padding_mode) -> None:
    conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode=padding_mode)
    _, model = prepared(nn.Sequential(conv), X[None].reshape(1, 4, 8), config=globally(**ACTIVATIONS_ONLY))
    simulated = model[0].conv1d_quantize_input(X[None].reshape(1, 4, 8))
    padded = F.pad(simulated, (1, 1), mode="constant" if padding_mode == "zeros" else padding_mode)
    expected = model[0].conv1d_quantize_output_0(F.conv1d(padded, conv.weight, conv.bias))
    assert torch.equal(model(X[None].reshape(1, 4, 8)), expected)


class Labelled(Tensor):
    """A subclass of tensors that torch's functions hand on."""


def test_subclasses_of_tensors_pass_all_simulators() -> None:
    _, model = prepared(Outer(), X)
    model.eval()
    expected = model(X)
    seen = []
    for simulator in simulators(model).values():
        simulator.register_forward_hook(lambda _, args, output: seen.append((type(args[0]), type(output))))
    output = model(X.as_subclass(Labelled))
    assert type(output) is Labelled
    assert torch.equal(output.as_subclass(Tensor), expected)
    assert (Labelled, Labelled) in seen
    assert (Labelled, Tensor) not in seen
