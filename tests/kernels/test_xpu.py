"""Intel's GPUs: what can be seen without one. Triton's kernels are those of every GPU."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coreai_kernels import wide

GPU = torch.device("xpu", 1)


def test_every_operator_is_registered() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("coreai_kernels::")]
    assert len(names) > 25
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "XPU") for name in names)


def test_a_kernel_starts_on_the_device_of_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from coreai_kernels.triton.launch import launch

    current = [0]

    @contextmanager
    def device(chosen: torch.device) -> Any:
        before, current[0] = current[0], chosen.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.xpu, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.xpu, "device", device)
    started = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: started.append((grid, args, current[0]))

    for index in (0, 1):
        tensor: Any = SimpleNamespace(device=torch.device("xpu", index))
        launch(Kernel(), 5, tensor, "x", warps=4)
    assert started == [((5,), ("x",), 0), ((5,), ("x",), 1)]
    assert current == [0]


def test_what_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from coreai_kernels.triton import launch

    asked = []

    def properties(index: int) -> Any:
        asked.append(index)
        return SimpleNamespace(gpu_subslice_count=56, has_fp64=index == 1)

    monkeypatch.setattr(torch.xpu, "get_device_properties", properties)
    tensor: Any = SimpleNamespace(device=GPU)
    assert launch.multiprocessors(tensor) == 56
    assert wide.has_float64(GPU)
    assert not wide.has_float64(torch.device("xpu", 2))
    assert asked == [1, 1, 2]
    launch._multiprocessors.cache_clear()
    wide._has_float64.cache_clear()
