"""Host time of the GPU operators without a GPU: ``python -m benchmarks.gpu_model.host``.

Launches do nothing, and memory is the CPU's. In a process without the CPU's kernels the operators for
CUDA tensors take those of the CPU, so that a fake quantizer's call goes the way of a CUDA tensor's, with
autograd's node and the dispatcher, up to where the launch would be: what the driver takes for that comes on
top, as it does for ATen. For Triton, its operators are registered for CPU tensors, and its launcher calls a
driver that does nothing. Captured calls are off: there are none for CUDA tensors.
"""

import argparse
import os
import shutil
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


def build(folder: Path) -> Path:
    """Compile the operators with launches that do nothing.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails; the text has its output.
    """
    from coreai_kernels.formats import native_header

    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (Debian: apt install g++)")
    header = folder / "include/common/formats.h"
    header.parent.mkdir(parents=True)
    header.write_text(native_header())
    output = folder / "operators.so"
    command = [compiler, "-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-DCOREAI_RECORDED"]
    command += ["-DCOREAI_EMULATED_THREADS=256", "-DCOREAI_GPU_LIBRARY=coreai_kernels,CPU"]
    command += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        f"-I{ROOT / 'csrc'}",
        f"-I{folder / 'include'}",
    ]
    command += [f"-I{ROOT / 'tests/kernels'}", "-isystem", str(Path(torch.__file__).parent / "include")]
    command += [str(ROOT / "tests/kernels/emulation/observe_and_fake_quantize.cpp"), "-o", str(output)]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{compiler} failed: {done.stderr[-3000:]}")
    return output


def without_kernels(folder: Path) -> Path:
    """A path on which ``coreai_kernels`` has no library of the CPU's kernels."""
    package = folder / "path/coreai_kernels"
    package.mkdir(parents=True)
    for file in (ROOT / "kernels/coreai_kernels").iterdir():
        if not file.name.startswith("_C.") and file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    return package.parent


def measure() -> None:
    """Time calls in turns, by processor time, and print the least of each."""
    import coreai_kernels as ck
    from benchmarks.cases import Case
    from benchmarks.simulation import Simulation
    from coreai_kernels import QuantConfig, Scheme

    assert ck.native.missing is not None
    x, scale = torch.randn(64, 64), torch.ones(64, 1)
    mask = torch.zeros(512, dtype=torch.uint8)
    int4 = (ck.Format.INT, -8.0, 7.0)
    config = QuantConfig((1, 64), Scheme.SYMMETRIC, *int4).packed()
    zero_point = torch.zeros(64, 1, dtype=torch.int32)
    ops = torch.ops.coreai_kernels
    forward, backward = ops.fake_quantize_forward.default, ops.fake_quantize_backward.default
    step = ops.observe_and_fake_quantize_.default
    calls: dict[str, Callable[[], object]] = {
        "ATen: x * scale": lambda: x * scale,
        "operator: forward": lambda: forward(x, scale, None, None, [1, 64], *int4, True),
        "operator: step": lambda: step(x, scale, zero_point, None, None, None, False, config, True),
        "operator: backward": lambda: backward(x, mask, []),
    }
    for name, variant in (("weight", "static"), ("activation", "moving_average")):
        case = Case("simulator", "int4", "channel 0", 64, "fp32", threads=1, variant=variant)
        simulation = Simulation(case)
        calls[f"module(x), a {name}'s, recording a gradient"] = simulation.forward
        calls[f"the same and its backward, {name}"] = simulation.training_step
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


def main() -> int:
    """Build, then measure in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model.host", description=__doc__)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--triton", action="store_true", help="Triton's operators alone")
    parser.add_argument("--in-here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_here:
        if arguments.library is not None:
            torch.ops.load_library(arguments.library)
        else:
            stub_driver.operators_of_cuda_on_the_cpu()
            stub_driver.install()
        torch.set_num_threads(1)
        measure()
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
            print("CUDA C++")
            library = ["--library", str(build(folder))]
            status = subprocess.run([*command, *library], env=environment, check=False).returncode
        print("Triton")
        stub_driver.build_libcuda(folder)
        environment |= stub_driver.environment(folder)
        return status or subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
