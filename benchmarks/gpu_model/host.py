"""Host time of the GPU operators without a GPU: ``python -m benchmarks.gpu_model.host``.

Launches do nothing, and memory is the CPU's. For CUDA C++ a torch without CUDA gets a GPU in that memory
(``tests/kernels/emulated_gpu.py``), so that a fake quantizer's call goes the way of a CUDA tensor's, with
guards, memory, autograd's node and the dispatcher, up to where the launch would be: what the driver takes for
that comes on top, as it does for ATen. Memory comes from the C library, where torch's allocator for GPUs has
lists of its own. Triton's operators are registered for CPU tensors, in a process without the CPU's kernels,
and its launcher calls a driver that does nothing. Its calls are never captured. ATen's are the CPU's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_model import stub_driver

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, CALLS = 40, 200


def without_kernels(folder: Path) -> Path:
    """A path on which ``coreai_kernels`` has no library of the CPU's kernels."""
    package = folder / "path/coreai_kernels"
    package.mkdir(parents=True)
    for file in (ROOT / "kernels/coreai_kernels").iterdir():
        if not file.name.startswith("_C.") and file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    return package.parent


def measure(device: str) -> None:
    """Time calls with tensors of the device in turns, by processor time, and print the least of each."""
    import coreai_kernels as ck
    from benchmarks.cases import Case
    from benchmarks.simulation import Simulation
    from coreai_kernels import QuantConfig, Scheme
    from coreai_kernels.runtime import fast_path_counts

    torch.set_num_threads(1)
    on_cpu, scale_on_cpu = torch.randn(64, 64), torch.ones(64, 1)
    x, scale = on_cpu.to(device), scale_on_cpu.to(device)
    mask = torch.zeros(512, dtype=torch.uint8).to(device)
    int4 = (ck.Format.INT, -8.0, 7.0)
    config = QuantConfig((1, 64), Scheme.SYMMETRIC, *int4).packed()
    zero_point = torch.zeros(64, 1, dtype=torch.int32).to(device)
    ops = torch.ops.coreai_kernels
    forward, backward = ops.fake_quantize_forward.default, ops.fake_quantize_backward.default
    step = ops.observe_and_fake_quantize_.default
    calls: dict[str, Callable[[], object]] = {
        "ATen: x * scale": lambda: on_cpu * scale_on_cpu,
        "operator: forward": lambda: forward(x, scale, None, None, [1, 64], *int4, True),
        "operator: step": lambda: step(x, scale, zero_point, None, None, None, False, config, True),
        "operator: backward": lambda: backward(x, mask, []),
    }
    for name, variant in (("a weight", "static"), ("an activation", "moving_average")):
        case = Case("simulator", "int4", "channel 0", 64, "fp32", threads=1, variant=variant)
        simulation = Simulation(case)
        simulation.module.to(device)
        simulation.input = simulation.input.detach().to(device).requires_grad_()
        simulation.grad = simulation.grad.to(device)
        calls[f"module(x), {name}'s, without a gradient"] = torch.no_grad()(simulation.forward)
        calls[f"module(x), {name}'s, recording a gradient"] = simulation.forward
        calls[f"the same and its backward, {name}"] = simulation.training_step
    leaf, gradient = x.detach().clone().requires_grad_(), torch.ones_like(x).view(4096)
    calls["ATen: a view and its gradient"] = lambda: torch.autograd.grad(leaf.view(4096), leaf, gradient)
    for call in calls.values():
        for _ in range(4):
            call()
    before = fast_path_counts()["hits"]
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            start = time.process_time_ns()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.process_time_ns() - start) / CALLS / 1000)
    print("64 x 64, float32, microseconds to the launch")
    for name, value in least.items():
        print(f"{name:50} {value:6.2f}")
    print(f"{fast_path_counts()['hits'] - before} calls were captured ones")


def _measure_cuda(folder: Path) -> int:
    from tests.kernels.cuda_support import build_emulated_gpu, environment_of_emulated_gpu

    build_emulated_gpu(folder, "-DCOREAI_RECORDED", threads=256)
    code = "from tests.kernels import emulated_gpu as gpu; from benchmarks.gpu_model.host import measure; "
    command = [sys.executable, "-c", f"{code}gpu.capture_calls(); measure('cuda:0')"]
    return subprocess.run(command, env=environment_of_emulated_gpu(folder), check=False).returncode


def main() -> int:
    """Build, then measure in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model.host", description=__doc__)
    parser.add_argument("--triton", action="store_true", help="Triton's operators alone")
    parser.add_argument("--in-here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_here:
        stub_driver.operators_of_cuda_on_the_cpu()
        stub_driver.install()
        measure("cpu")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = os.pathsep.join([str(without_kernels(folder)), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "COREAI_FAST_PATH": "0"}
        # By -c: the folder of a module is put on the path ahead of the environment's.
        code = "import sys; from benchmarks.gpu_model.host import main; sys.exit(main())"
        command = [sys.executable, "-P", "-c", code, "--in-here"]
        status = 0
        if not arguments.triton:
            print("CUDA C++", flush=True)
            status = _measure_cuda(folder)
        print("Triton")
        stub_driver.build_libcuda(folder)
        environment |= stub_driver.environment(folder)
        return status or subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
