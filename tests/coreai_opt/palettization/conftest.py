import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coreai_opt.palettization import PalettizationSpec
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize


class HostReads(TorchDispatchMode):
    """Counts the operators that hand a tensor's value to the host."""

    READING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if any(name.startswith(each) for each in self.READING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_reads():
    return HostReads()


@pytest.fixture
def weight():
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def simulator():
    """Builds a simulator from the fields of a specification; exact unless a field says otherwise."""

    def build(enable_fast_kmeans_mode=False, rounding_precision=4, sensitivities=None, **fields):
        return _KMeansFakePalettize(
            **PalettizationSpec(**fields).model_dump_preserve_objects(),
            enable_fast_kmeans_mode=enable_fast_kmeans_mode,
            rounding_precision=rounding_precision,
            sensitivities=sensitivities,
        )

    return build


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
