"""The simulator by itself: when the mask is computed, gradients, checkpoints, compilation."""

import copy
import io
import pickle
import sys
from collections import OrderedDict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coreai_opt.pruning.config import PolynomialDecaySchedule, SparsityScheduleBase
from coreai_opt.pruning.spec import NMStructured, PruneImplBase, Unstructured

Magnitude = PruneImplBase.get_class("default")


class Tenths(SparsityScheduleBase):
    """A tenth more at each step."""

    def compute_sparsity(self, step_count, target_sparsity):
        return 0.1 * step_count


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(sparsity=0.5, schedule=None):
    simulator = Magnitude(sparsity, Unstructured())
    simulator.schedule = schedule
    return simulator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward(dtype):
    weight, simulator = randn(8, 8, dtype=dtype), make()
    assert list(simulator.state_dict()) == ["mask", "step_count"]
    assert simulator.mask.shape == (0,)
    output = simulator(weight)
    assert simulator.mask.shape == weight.shape
    assert simulator.mask.dtype == output.dtype == dtype
    assert simulator.mask.sum() == 32
    assert torch.equal(output, weight * simulator.mask)


def test_the_gradient_of_what_is_pruned_is_zero():
    weight, simulator = randn(8, 8).requires_grad_(), make()
    grad = randn(8, 8, seed=1)
    simulator(weight).backward(grad)
    assert torch.equal(weight.grad, grad * simulator.mask)
    assert not simulator.mask.requires_grad


def test_the_mask_stays_while_the_sparsity_does():
    simulator = make(schedule=Tenths())
    simulator.update_sparsity(5)
    simulator(randn(8, 8))
    mask = simulator.mask.clone()
    simulator.update_sparsity(5)
    simulator(randn(8, 8, seed=1))
    assert torch.equal(simulator.mask, mask)
    simulator.update_sparsity(6)
    assert simulator.sparsity == pytest.approx(0.6)
    assert torch.equal(simulator.mask, mask)
    simulator(randn(8, 8, seed=1))
    assert not torch.equal(simulator.mask, mask)
    assert simulator.mask.sum() == 64 - 38


def test_without_a_schedule():
    with pytest.raises(RuntimeError, match="has no sparsity schedule"):
        make().update_sparsity(1)


@pytest.mark.parametrize("sparsity", [-0.5, 1.5, float("nan")])
def test_a_sparsity_must_be_a_fraction(sparsity):
    with pytest.raises(ValueError, match=r"target_sparsity must be in \[0, 1\]"):
        make(sparsity)


def test_a_schedule_that_leaves_the_range_changes_nothing():
    simulator = make(schedule=Tenths())
    simulator.update_sparsity(3)
    simulator(randn(4, 4))
    mask = simulator.mask.clone()
    with pytest.raises(ValueError, match="the sparsity of Tenths at step 11 must be in"):
        simulator.update_sparsity(11)
    assert simulator.step_count == 0
    assert simulator.sparsity == pytest.approx(0.3)
    assert not simulator.is_stale
    assert torch.equal(simulator.mask, mask)


def test_a_weight_of_another_shape():
    simulator = make()
    simulator(randn(4, 4))
    simulator.tensor_fqn = "fc.weight"
    with pytest.raises(
        RuntimeError, match=r"'fc.weight': the mask has shape \(4, 4\), the weight has \(3, 3\)"
    ):
        simulator(randn(3, 3))


def test_a_mask_that_cannot_be_computed_leaves_the_old_one():
    simulator = Magnitude(0.5, NMStructured())
    simulator(randn(4, 4))
    mask = simulator.mask.clone()
    simulator._stale = True
    with pytest.raises(ValueError, match="6"):
        simulator(randn(4, 6))
    with pytest.raises(TypeError):
        simulator(torch.ones(4, 4, dtype=torch.int32))
    assert torch.equal(simulator.mask, mask)


def test_a_subclass_whose_mask_has_another_shape():
    class Wrong(PruneImplBase):
        @staticmethod
        def compute_mask(weight, sparsity, pruning_scheme):
            return torch.ones(2)

    simulator = Wrong(0.5, Unstructured())
    with pytest.raises(RuntimeError, match=r"Wrong.compute_mask gave a mask of shape \(2,\)"):
        simulator(randn(4, 4))


def test_with_args():
    make_one = Magnitude.with_args(pruning_scheme=Unstructured()).with_args(target_sparsity=0.25)
    first, second = make_one(), make_one()
    assert first.sparsity == 0.25
    assert first is not second


def test_repr():
    assert "sparsity=0.5, target=0.5, Unstructured" in repr(make())


def through_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SCHEDULE = PolynomialDecaySchedule(total_iters=20, update_frequency=3)


def walk(simulator, steps, seed):
    """The outputs of some training steps, whose weights the seed and the step give."""
    outputs = []
    for _ in range(steps):
        simulator.step_count += 1
        simulator.update_sparsity(simulator.steps())
        outputs.append(simulator(randn(8, 8, seed=seed + simulator.steps())))
    return outputs


@pytest.mark.parametrize("transfer", [lambda state: state, through_save, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("before", [1, 4, 7, 30])
def test_a_schedule_goes_on_from_a_checkpoint(transfer, before):
    through, resumed = make(0.8, SCHEDULE), make(0.8, SCHEDULE)
    walk(through, before, seed=0)
    state = transfer(through.state_dict())
    if isinstance(state, bytes):
        state = pickle.loads(state)
    assert list(state) == ["mask", "step_count"]
    assert (state["step_count"].dtype, tuple(state["step_count"].shape)) == (torch.int64, ())
    resumed.load_state_dict(dict(state))  # as a file without metadata gives it
    assert (resumed.steps(), resumed.sparsity) == (through.steps(), through.sparsity)
    assert torch.equal(resumed.mask, through.mask)
    for first, second in zip(walk(through, 10, seed=100), walk(resumed, 10, seed=100), strict=True):
        assert torch.equal(first, second)


def test_a_loaded_mask_is_current():
    through, resumed = make(0.8, SCHEDULE), make(0.8, SCHEDULE)
    walk(through, 7, seed=0)
    resumed.load_state_dict(through.state_dict())
    assert not resumed.is_stale
    mask = resumed.mask.clone()
    resumed(randn(8, 8, seed=99))
    assert torch.equal(resumed.mask, mask)


def test_a_state_without_a_mask_leaves_the_mask_to_be_computed():
    resumed = make(0.8, SCHEDULE)
    resumed.load_state_dict(make(0.8, SCHEDULE).state_dict())
    assert resumed.is_stale
    assert resumed(randn(8, 8)).shape == (8, 8)


def test_states_without_a_step_load_strictly():
    """Those of coreai-opt 0.3.0: the step stays as it is."""
    through, resumed = make(0.8, SCHEDULE), make(0.8, SCHEDULE)
    walk(through, 7, seed=0)
    state = {"mask": through.mask}
    resumed.load_state_dict(state)
    assert list(state) == ["mask"]
    assert torch.equal(resumed.mask, through.mask)
    assert resumed.steps() == 0
    resumed.set_steps(7)
    assert resumed.sparsity == through.sparsity
    for first, second in zip(walk(through, 10, seed=100), walk(resumed, 10, seed=100), strict=True):
        assert torch.equal(first, second)


def test_states_with_the_step_in_the_metadata_load():
    """Those of this package before it had the buffer."""
    through, resumed = make(0.8, SCHEDULE), make(0.8, SCHEDULE)
    walk(through, 7, seed=0)
    state = OrderedDict(mask=through.mask)
    state._metadata = {"": {"version": 1, "pruning": {"step_count": 7, "sparsity": 0.1, "stale": False}}}
    resumed.load_state_dict(state)
    assert (resumed.steps(), resumed.sparsity) == (7, through.sparsity)


def test_a_step_that_others_write_is_seen():
    simulator = make(0.8, SCHEDULE)
    assert simulator.steps() == 0
    simulator.step_count.fill_(4)
    assert simulator.steps() == 4
    simulator.step_count = torch.tensor(9)
    assert simulator.steps() == 9


def test_a_mask_is_moved_and_cast_in_each_forward():
    simulator = make()
    simulator(randn(4, 4))
    weight = randn(4, 4, dtype=torch.bfloat16)
    assert simulator(weight).dtype is torch.bfloat16
    assert simulator.mask.dtype is torch.bfloat16
    assert simulator(randn(4, 4)).dtype is torch.float32
    assert simulator.mask.dtype is torch.float32


@pytest.mark.parametrize("move", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(move):
    simulator = make(0.8, SCHEDULE)
    walk(simulator, 4, seed=0)
    moved = move(simulator)
    assert moved.sparsity == simulator.sparsity
    for first, second in zip(walk(simulator, 5, seed=9), walk(moved, 5, seed=9), strict=True):
        assert torch.equal(first, second)


def test_the_mask_follows_the_module():
    simulator = make()
    simulator(randn(4, 4))
    simulator.half()
    assert simulator.mask.dtype == torch.float16
    weight = randn(4, 4, dtype=torch.float16)
    assert torch.equal(simulator(weight), weight * simulator.mask)


class NoSynchronisation(TorchDispatchMode):
    """Fails where a GPU would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    simulator, weight = make(0.8, SCHEDULE), randn(8, 8).requires_grad_()
    with NoSynchronisation():
        for step in range(7):
            simulator.update_sparsity(step)
            simulator(weight).sum().backward()


@pytest.mark.skipif(
    torch.__version__ < "2.11" and sys.version_info[:3] == (3, 13, 0),
    reason="beside CPython 3.13.0 torch 2.10 compiles programs that miss changes of a module's attributes",
)
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_without_a_graph_break(warm):
    torch._dynamo.reset()
    eager, compiled_module = make(0.8, SCHEDULE), make(0.8, SCHEDULE)
    compiled = torch.compile(compiled_module, fullgraph=True, backend="aot_eager")
    if warm:
        eager(randn(8, 8)), compiled_module(randn(8, 8))
    for step in range(8):
        first, second = (randn(8, 8, seed=step).requires_grad_() for _ in range(2))
        eager.update_sparsity(step)
        compiled_module.update_sparsity(step)
        a, b = eager(first), compiled(second)
        assert torch.equal(a, b)
        grad = randn(8, 8, seed=50)
        a.backward(grad)
        b.backward(grad)
        assert torch.equal(first.grad, second.grad)
        assert torch.equal(eager.mask, compiled_module.mask)
        assert not compiled_module.is_stale
