"""Choice of backend: forcing, threads, environment, what is said about a missing one, and its cost."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from coreai_kernels import backends, native


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    """The state of a fresh process, whatever the environment or other tests did."""
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setattr(backends, "_requests", [])
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends, "_verified", {"reference"})
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native, "missing", native.Missing("no C++ compiler was found", "apt install g++"))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cleared = {"COREAI_KERNELS_BACKEND", "COREAI_CPU_CAPABILITY", "TRITON_INTERPRET"}
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=inherited | environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_nested_contexts_restore_what_was_forced_before():
    assert backends.forced() is None
    with backends.use_backend("reference"):
        assert backends.forced() == "reference"
        with backends.use_backend("auto"):
            assert backends.forced() is None
        assert backends.forced() == "reference"
    assert backends.forced() is None


def test_context_ends_with_an_exception():
    with pytest.raises(KeyError), backends.use_backend("reference"):
        raise KeyError
    assert backends.forced() is None


def test_choice_reaches_other_threads():
    seen = []
    with backends.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_choice_reaches_backward():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(backends.forced())
            return grad

    with backends.use_backend("reference"):
        Probe.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen == ["reference"]


def test_contexts_that_overlap_between_threads_leave_nothing_behind():
    first_entered, second_entered, first_left = (threading.Event() for _ in range(3))

    def first():
        with backends.use_backend("reference"):
            first_entered.set()
            second_entered.wait(10)
        first_left.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_entered.wait(10)
    with backends.use_backend("auto"):
        second_entered.set()
        first_left.wait(10)
        assert backends.forced() is None
    thread.join()
    assert backends.forced() is None


def test_unknown_name_lists_the_backends():
    with pytest.raises(ValueError, match="unknown backend 'cuda'; the backends are auto, reference, native"):
        backends.use_backend("cuda").__enter__()


def test_forcing_a_missing_backend_says_why_and_what_to_do(no_native):
    with (
        pytest.raises(RuntimeError, match=r"'native'.*no C\+\+ compiler.*apt install g\+\+"),
        backends.use_backend("native"),
    ):
        pass
    assert backends.forced() is None


def test_available_gives_a_reason_for_each_missing_backend(no_native):
    table = backends.available()
    assert set(table) == set(backends.NAMES) - {"auto"}
    assert table["reference"] == (True, "")
    assert all(usable != bool(reason) for usable, reason in table.values())
    assert table["native"] == (False, "no C++ compiler was found. To fix: apt install g++")


def test_triton_runs_interpreted_on_a_cpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backends.require("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.require("triton")


def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        backends.require("triton")


def test_missing_backend_is_warned_of_once(no_native):
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler.*To fix: apt install g\+\+"):
        backends.warn_missing_once("native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.warn_missing_once("native")


@pytest.mark.parametrize("ask", [backends.forced, lambda: backends.require("reference")])
def test_asking_calls_nothing_else(ask):
    # No import, lock or look-up may find its way into what every operator's call asks.
    called = []
    sys.setprofile(lambda frame, event, arg: called.append(event) if event in ("call", "c_call") else None)
    try:
        ask()
    finally:
        sys.setprofile(None)
    assert len(called) <= 3  # the lambda, the function, and the end of the profile


def test_fullgraph_compilation_follows_the_choice():
    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def scaled(x):
        forced = backends.forced()
        if forced is None:
            return x * 2
        backends.require(forced)
        return x * 3

    x = torch.ones(3)
    assert scaled(x)[0] == 2
    with backends.use_backend("reference"):
        assert scaled(x)[0] == 3
    assert scaled(x)[0] == 2


def test_environment_forces_a_backend():
    code = "from coreai_kernels import backends; print(backends.forced())"
    assert run_python(code, COREAI_KERNELS_BACKEND="reference").stdout.split() == ["reference"]
    assert run_python(code, COREAI_KERNELS_BACKEND="auto").stdout.split() == ["None"]


def test_environment_with_an_unknown_backend():
    result = run_python("import coreai_kernels", COREAI_KERNELS_BACKEND="fast")
    assert result.returncode != 0
    assert "COREAI_KERNELS_BACKEND: unknown backend 'fast'" in result.stderr


@pytest.mark.skipif(native.extension is None, reason=f"no native extension: {native.missing}")
class TestCpuCapability:
    code = "from coreai_kernels import native; print(native.extension.cpu_capability())"

    def test_each_compiled_instruction_set_up_to_the_best_can_be_chosen(self):
        isas = native.extension.build_info()["cpu_isas"].split()
        assert isas[0] == "generic"
        best = native.extension.cpu_capability()
        for isa in isas[: isas.index(best) + 1]:
            assert run_python(self.code, COREAI_CPU_CAPABILITY=isa).stdout.split() == [isa]

    def test_another_can_be_chosen_later(self):
        best = native.extension.cpu_capability()
        try:
            native.extension.set_cpu_capability("generic")
            assert native.extension.cpu_capability() == "generic"
            with pytest.raises(RuntimeError, match="'sse9': unknown; use generic, avx2, avx512 or neon"):
                native.extension.set_cpu_capability("sse9")
            assert native.extension.cpu_capability() == "generic"
        finally:
            native.extension.set_cpu_capability(best)

    def test_unknown_instruction_set_is_an_error_when_loading(self):
        result = run_python(self.code, COREAI_CPU_CAPABILITY="sse9")
        assert result.returncode != 0
        assert "RuntimeError: COREAI_CPU_CAPABILITY=sse9: unknown; use generic, avx2" in result.stderr
