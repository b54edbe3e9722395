"""The oracle's answers, computed once a session, and the backends that ours runs on."""

import fcntl
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from coreai_kernels import backends, use_backend

from . import oracle


class Oracle:
    """Asks Apple's package each job once a session, whichever worker comes first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: dict[str, str] = {}

    def ask(
        self, name: str, job: dict[str, Any] | Callable[[], dict[str, Any]], accelerated: bool = False
    ) -> Any:
        """The answer to ``job``, which must be the same whenever ``name`` is. See :func:`oracle.ask`.

        A function that returns the job is called only where nobody has asked before.
        """
        name += "-accelerated" if accelerated else ""
        answer = self.folder / f"{name}.pickle"
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not answer.exists():
                if name in self.failed:  # it would take as long to fail again
                    raise RuntimeError(self.failed[name])
                job = job() if callable(job) else job
                try:
                    found = oracle.ask(job, self.folder / name, accelerated)
                except RuntimeError as error:
                    self.failed[name] = str(error)
                    raise
                answer.write_bytes(pickle.dumps(found))
        return pickle.loads(answer.read_bytes())


@pytest.fixture(scope="session")
def asked_oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Apple's package. Skips where it is not installed, except in CI, where the set-up installs it."""
    if not oracle.find():
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(oracle.INSTALL, pytrace=False)
        pytest.skip(oracle.INSTALL)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "parity"
    folder.mkdir(exist_ok=True)
    return Oracle(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in the oracle's process: sums over a batch depend on how torch splits them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def oracle_answers(asked_oracle: Oracle) -> dict[str, Any]:
    """``{"cases": {name: log}, "calls": {name: value}}`` from Apple's package."""
    return asked_oracle.ask("table", {"what": "table"})


BACKENDS = ["reference"] + ["auto"] * backends.available()["native"][0]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of ours: the definition, and what the device picks where that is another one."""
    with use_backend(request.param):
        yield request.param
