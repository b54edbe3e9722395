"""What goes wrong around training: killed processes, full disks, no memory, losses that overflow, threads."""

import copy
import importlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import coreai_opt
from coreai_kernels import native
from coreai_opt.export import save
from coreai_opt.inspection import report
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig, ModuleMagnitudePrunerConfig
from coreai_opt.pruning.config import PolynomialDecaySchedule
from coreai_opt.pruning.spec import PruningSpec
from coreai_opt.quantization import Quantizer, QuantizerConfig
from tests import forked
from tests.kernels.support import assert_same_bits
from tests.threads import together

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs processes that share what was imported"
)

STEPS = 40


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def prepared() -> tuple[nn.Module, MagnitudePruner, Quantizer]:
    model = network()
    entry = ModuleMagnitudePrunerConfig(
        op_state_spec={"weight": PruningSpec(target_sparsity=0.5)},
        sparsity_schedule=PolynomialDecaySchedule(total_iters=STEPS),
    )
    pruner = MagnitudePruner(model, MagnitudePrunerConfig(global_config=entry))
    pruner.prepare(batch(0)[:1])
    quantizer = Quantizer(model, QuantizerConfig(execution_mode="eager"))
    return quantizer.prepare(batch(0)[:1]), pruner, quantizer


def steps_of(pruner: MagnitudePruner) -> int:
    steps: int = pruner.state_dict()["step_count"]
    return steps


def train(model: nn.Module, pruner: MagnitudePruner, quantizer: Quantizer, path: Path) -> None:
    """From the step that the pruner is at to the last one, with a checkpoint after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with quantizer.training_mode():
        for step in range(steps_of(pruner), STEPS):
            inputs, labels = batch(step)
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
            coreai_opt.save_checkpoint(model, path)


def child(work: Callable[..., None], *args: Any) -> Any:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_with_one_thread, args=(work, *args), daemon=True)
    process.start()
    return process


def _with_one_thread(work: Callable[..., None], *args: Any) -> None:
    # OpenMP's other threads, if an earlier test started any, are not forked: it would wait for them for ever.
    torch.set_num_threads(1)
    work(*args)


def end_as_if_not_killed(folder: Path) -> int:
    """Train in processes that are killed at random moments; return how many were. The caller never trains."""
    importlib.import_module("torch._dynamo")  # optimizers do, which takes longer than a process may live
    whole = child(train, *prepared(), folder / "whole.safetensors")
    whole.join()
    expected = coreai_opt.load_checkpoint(network(), folder / "whole.safetensors").model.state_dict()
    path = folder / "killed" / "model.safetensors"
    path.parent.mkdir()
    choose, kills, longest = random.Random(1), 0, 0.4
    state: Any = prepared()
    for _ in range(200):
        if steps_of(state[1]) == STEPS:
            break
        process = child(train, *state, path)
        process.join(choose.uniform(0.05, longest))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            process.join()
        before = steps_of(state[1])
        if path.exists():
            model, compressors = coreai_opt.load_checkpoint(network(), path)
            state = (model, *compressors)
            assert steps_of(state[1]) >= before
        if steps_of(state[1]) == before:  # on a busy machine a step takes longer than any of them lived
            longest *= 1.5
    assert steps_of(state[1]) == STEPS
    found = state[0].state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert_same_bits(found[name], value, name)
    return kills


def test_killed_while_it_trains_and_saves(tmp_path: Path) -> None:
    """Whenever it is killed, a whole checkpoint is there; training from it ends as if nothing had been."""
    # In a process of its own: one that has computed gradients cannot be forked and go on with that.
    program = (
        f"import sys, pathlib; from {__name__} import end_as_if_not_killed; "
        "print(end_as_if_not_killed(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 0


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path: Path) -> None:
    model, pruner, _ = prepared()
    path = coreai_opt.save_checkpoint(model, tmp_path / "model.safetensors")
    content = path.read_bytes()

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        pruner.step()
        try:
            coreai_opt.save_checkpoint(model, path)
        except Exception:  # noqa: BLE001 - of safetensors; what matters is what is left
            os._exit(3)
        os._exit(0)

    process = child(save)
    process.join()
    assert process.exitcode == 3
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def as_nobody(work: Callable[[], None]) -> int:
    """The exit status of a process that may write where everybody may: root writes everywhere."""

    def run() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    process = child(run)
    process.join()
    status: int = process.exitcode
    return status


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_is_read_only_is_named_and_stays_as_it_was() -> None:
    model, *_ = prepared()
    before = copy.deepcopy(model.state_dict())
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to others
        folder = Path(name)
        path = coreai_opt.save_checkpoint(model, folder / "model.safetensors")
        content = path.read_bytes()
        folder.chmod(0o555)

        def write() -> None:
            for work in (
                lambda: coreai_opt.save_checkpoint(model, path),
                lambda: save(model, folder / "model.pt2", batch(0)[:1], progress=False),
                lambda: report(model, folder / "report.html"),
            ):
                with pytest.raises(PermissionError, match=name):
                    work()
            same = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
            os._exit(0 if same else 5)

        assert as_nobody(write) == 0
        assert [each.name for each in folder.iterdir()] == [path.name]
        assert path.read_bytes() == content
        folder.chmod(0o755)


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_overflows_changes_no_weight() -> None:
    """GradScaler leaves out steps with gradients that are not finite; the next ones are as ever."""
    model, pruner, quantizer = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, labels = batch(0)
    with quantizer.training_mode():
        for factor in (1.0, float("inf"), float("nan"), 1.0):
            before = {name: each.detach().clone() for name, each in model.named_parameters()}
            loss = nn.functional.cross_entropy(model(inputs), labels) * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            pruner.step()
            changed = any(not torch.equal(before[name], each) for name, each in model.named_parameters())
            assert changed == (factor == 1.0)
    assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())
    assert scaler.get_scale() == 256.0


def memory_ends_in_a_forward() -> None:
    quantizer = Quantizer(nn.Sequential(nn.Linear(4, 4)), QuantizerConfig(execution_mode="eager"))
    model = quantizer.prepare((torch.randn(2, 4),))
    large = torch.randn(1 << 22, 4)
    with quantizer.training_mode():
        model(torch.randn(2, 4))
        before = copy.deepcopy(model.state_dict())
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (16 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(RuntimeError) as raised:
            model(large)
        # The operator, and what it wanted; no path of whoever built it.
        wanted = "coreai_kernels::observe_and_fake_quantize_", f"{large.nbytes} bytes", "[4194304, 4]"
        assert native.missing or all(each in str(raised.value) for each in wanted), raised.value
        assert ".h:" not in str(raised.value)
        for name, value in model.state_dict().items():
            assert torch.equal(before[name], value), name


def test_memory_that_ends_in_a_forward_leaves_the_simulator_as_it_was() -> None:
    """A forward that cannot have its output raises, and neither ranges nor scales move."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    # Not forked from here: an earlier test may have left as much free memory as the output takes.
    script = f"from {__name__} import memory_ends_in_a_forward; memory_ends_in_a_forward()"
    imports = f"import warnings; warnings.simplefilter('ignore'); import {__name__}"
    done = forked.run(script, imports, [str(Path(__file__).parents[1]), *filter(None, sys.path)])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore")
def test_models_in_threads_of_their_own(tmp_path: Path) -> None:
    """Four trainings at once end as one does."""
    start = prepared()
    states = [copy.deepcopy(start) for _ in range(4)]
    train(*start, tmp_path / "alone.safetensors")
    together(
        *(partial(train, *state, tmp_path / f"{index}.safetensors") for index, state in enumerate(states))
    )
    for model, *_ in states:
        for name, value in start[0].state_dict().items():
            assert_same_bits(model.state_dict()[name], value, name)


@pytest.mark.filterwarnings("ignore")
def test_one_model_in_several_threads() -> None:
    """Forwards and gradients of a model whose ranges stand still are those of one thread."""
    model, _, quantizer = prepared()
    with quantizer.training_mode():
        model(batch(0)[0])
    model.eval()
    expected = [model(batch(step)[0]).detach() for step in range(50)]

    def work(index: int) -> None:
        for step in range(50):
            inputs = batch(step)[0].requires_grad_()
            output = model(inputs)
            assert_same_bits(output.detach(), expected[step], f"thread {index}, {step}")
            torch.autograd.grad(output.sum(), inputs)
            time.sleep(0)

    together(*(partial(work, index) for index in range(4)))
