"""The benchmark suite end to end on tiny matrices: what it writes, not how fast anything is."""

import importlib.util
import io
import json
import math
import os
import time

import pytest
import torch
from rich.console import Console

from benchmarks import cli, gpu_check, gpu_timing, targets
from benchmarks.apple import Apple, AppleError
from benchmarks.cases import Case, Sweep, geometric_mean
from benchmarks.gpu_cases import OPERATIONS as GPU_OPERATIONS
from benchmarks.gpu_cases import cases
from benchmarks.gpu_check import until
from benchmarks.gpu_operators import operator_benches
from benchmarks.gpu_peers import modelopts, torchaos
from benchmarks.gpu_predictions import Predictions
from benchmarks.gpu_training import training_loop
from benchmarks.harness import COPY, MULTIPLY, NATIVE, Bench, Effort, Local, Result, add_if_supported, measure
from benchmarks.memory import held_and_peak_bytes
from benchmarks.plot import save_plot
from benchmarks.report import Report, print_comparison, print_report
from benchmarks.simulation import FORWARD, TRAINING
from benchmarks.suite import OPERATIONS, Options, run

TINY = Effort(rounds=2, sample_seconds=1e-5)


def fake_result(native: float = 1.0, **seconds: float) -> Result:
    case = Case("simulator", "int8", "tensor", 1024, "fp32", 1, FORWARD, "static")
    times = {COPY: 0.5, NATIVE: native, **seconds}
    return Result(case, times, dict.fromkeys(times, 0.0), floor_bytes=8 * case.numel)


def fake_report(*results: Result) -> Report:
    machine = {"cpu": "a", "isa": "avx2", "torch": "2", "huge_pages": False, "date": "today"}
    return Report(machine, "command", 1.0, list(results), targets.evaluate(results, "avx2"), [])


def test_product_with_one_stands_beside_the_targets() -> None:
    (row,) = targets.evaluate([fake_result(apple=4.0, **{MULTIPLY: 0.25})], "avx512")
    assert (row["mean"], row["product"]) == pytest.approx((4.0, 16.0))
    assert "16.0×" in text_of(print_report, fake_report(fake_result(apple=4.0, **{MULTIPLY: 0.25})))


def test_gpu_check_runs_masks_and_palettes_where_their_tensors_are() -> None:
    ran = set()
    for case, bench in operator_benches([64], "cpu"):
        bench.contenders[NATIVE]()  # type: ignore[operator]
        assert bench.floor_bytes > 0
        ran.add(case.op)
    assert ran == {"topk_mask", "nm_mask", "block_mask", "palettize", "lookup", "soft_palettize"}
    for _, bench in operator_benches([64], "meta"):
        outputs = bench.contenders[NATIVE]()  # type: ignore[operator]
        assert all(output.is_meta for output in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))


@pytest.mark.parametrize("operation", GPU_OPERATIONS)
def test_gpu_check_compares_the_same_simulation(operation: str) -> None:
    """Ours, torch's and torchao's give one result on the same parameters: like is compared with like."""
    compared = 0
    for case, its_operation in cases(64, torch.float32, "cpu"):
        if its_operation != operation:
            continue
        ours = case.ours(operation)()
        theirs = {"torch": case.torchs_own(operation), "torchao": torchaos(case, operation)}
        assert modelopts(case, operation) is None or importlib.util.find_spec("modelopt")
        for call in theirs.values():
            if call is not None:
                found = call()
                assert found.shape == case.x.shape
                if operation == "forward":
                    assert torch.allclose(found, ours[0], atol=0.06)  # a step of the scale at ties
                    assert (found - ours[0]).abs().gt(1e-5).float().mean() < 0.01
                compared += 1
    assert compared >= {"forward": 8, "backward": 1, "step": 8}[operation]


def row_of_model(operation: str, case: str, compiler: str, devices: dict) -> dict:
    facts = {"operation": operation, "case": case, "dtype": "fp32", "bytes": 8.125}
    return facts | {"compiler": compiler, "devices": devices}


def test_gpu_check_expects_what_the_model_says() -> None:
    rows = [
        row_of_model("forward", "int8, rows", "Triton", {"H200": {"share": 0.9}}),
        row_of_model("forward", "int8, rows", "CUDA C++", {"H200": {"share": 0.5}}),
        row_of_model("backward", "", "Triton", {"A100": {"share": 0.5}}),
    ]
    found = {
        (case.format_name, case.granularity, operation): Predictions(rows, "NVIDIA H200").microseconds(
            case, operation, "fp32", copy=10.0
        )
        for case, operation in cases(64, torch.float32, "cpu")
    }
    assert found.pop(("int8", "channel", "forward")) == pytest.approx(10.0 * 65 / 64 / 0.5)
    assert set(found.values()) == {None}


def test_gpu_check_finds_predictions_of_all_its_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timing, "host_time", lambda run: 5.0)
    predictions = Predictions.read(gpu_check.PREDICTIONS, "NVIDIA H200")
    timer = lambda run: 10.0  # noqa: E731
    rows = list(gpu_check.measure(timer, 64, predictions, compiles=False, device="cpu"))
    rows += gpu_check.measure_operators(timer, 64, predictions, compiles=False, device="cpu")
    predicted = {row["operation"] for row in rows if row["predicted_us"] is not None}
    assert predicted == {"forward", "backward", "step", "topk_mask", "nm_mask"}
    without = {row["operation"] for row in rows if row["predicted_us"] is None}
    assert not without & {"forward", "backward", "step", "topk_mask"}  # the model has two of the N:M masks
    for row in rows:
        # A copy takes 10 microseconds, and all read and write as much at least.
        assert row["predicted_us"] is None or 9.99 < row["predicted_us"] < 200
    gpu_check.show(rows[:3], "a title")


def test_gpu_check_trains() -> None:
    found = training_loop("cpu", width=16, batch=8, steps=20, graphs=False)
    assert set(found["milliseconds"]) == {"float", "quantized"}
    assert found["last_losses"]["quantized"] == pytest.approx(found["last_losses"]["float"], rel=0.1)
    assert found["last_losses"]["quantized"] != found["last_losses"]["float"]


def test_gpu_check_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    rows = iter([{"number": 1}, {"number": 2}])
    assert list(until(time.monotonic() - 1, rows)) == [{"number": 1}]
    assert "the time is up" in capsys.readouterr().err


def text_of(function, *args) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    function(*args, console)
    return console.export_text()


@pytest.fixture(scope="module")
def report() -> Report:
    sweep = Sweep((64,), ("fp32", "bf16"), (1,), quick=True)
    return run(Options(OPERATIONS, sweep, TINY, apple=None, compile="none", command="a command"))


def test_every_operation_is_measured_on_both_backends(report):
    assert {result.case.op for result in report.results} == set(OPERATIONS) - {"memory"}
    assert len({result.case.key for result in report.results}) == len(report.results)
    for result in report.results:
        assert {COPY, NATIVE, "reference"} <= set(result.seconds)
        assert all(seconds > 0 for seconds in result.seconds.values())
        assert math.isfinite(result.share_of_floor)


def test_torch_competes_where_it_has_the_operation(report):
    with_torch = {result.case.op for result in report.results if "torch" in result.seconds}
    assert with_torch >= {"fake_quantize", "fake_quantize_backward", "observe_and_fake_quantize", "simulator"}


def test_memory_of_a_step(report):
    fp32, bf16 = (row["ours"] for row in report.memory)
    assert fp32["saved_per_element"] == pytest.approx(1 / 8, abs=0.01)
    assert bf16["saved_per_element"] == pytest.approx(1 / 8, abs=0.01)
    assert fp32["peak_per_element"] == pytest.approx(8 + 1 / 8, abs=0.5)
    assert bf16["peak_per_element"] == pytest.approx(4 + 1 / 8, abs=0.5)


def test_json_round_trip_and_schema(report, tmp_path):
    path = tmp_path / "new" / "results.json"
    report.save(path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, which is not JSON
    assert set(data) == {"schema", "machine", "command", "seconds", "results", "targets", "memory"}
    assert {"cpu", "isa", "torch", "date", "threads", "cores", "load"} <= set(data["machine"])
    assert {"key", "case", "seconds", "spread", "ratios", "floor_seconds", "memory"} <= set(
        data["results"][0]
    )
    loaded = Report.load(path)
    assert loaded.results == report.results
    path.write_text(json.dumps(data | {"schema": -1}))
    with pytest.raises(ValueError, match="schema -1"):
        Report.load(path)


def test_tables_name_operations_and_figures(report):
    text = text_of(print_report, report)
    for word in (
        *OPERATIONS[:-1],
        "block 32",
        "reference/ours",
        "torch/ours",
        "of floor",
        "Memory of a training step",
    ):
        assert word in text
    assert "fake_quantize_backward\n" not in text_of(lambda r, c: print_report(r, c, details=False), report)


def test_command_line_writes_files_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_options", shortened(cli._options))
    new, plot = tmp_path / "new.json", tmp_path / "new.png"
    arguments = ["--op", "fake_quantize", "--sizes", "32", "--dtypes", "bf16", "--threads", "1", "--quick"]
    assert cli.main([*arguments, "--json", str(new), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads(new.read_text())["command"].startswith("python -m benchmarks --op fake_quantize")
    assert cli.main([*arguments, "--summary", "--compare", str(new)]) == 0
    assert "speed-up" in capsys.readouterr().out


def shortened(options):
    def shorter(*args):
        return Options(**(vars(options(*args)) | {"effort": TINY, "apple": None}))

    return shorter


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--cpu-capability", "avx2"], {"COREAI_CPU_CAPABILITY": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}),
        (["--huge-pages"], {"THP_MEM_ALLOC_ENABLE": "1"}),
    ],
)
def test_settings_that_precede_the_interpreter(flags, expected, monkeypatch):
    started = []

    def execve(program, arguments, environment):
        started.append((arguments, environment))
        raise SystemExit

    for name in expected:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        cli.main(flags)
    (arguments, environment) = started[0]
    assert arguments[1:] == ["-m", "benchmarks", *flags]
    assert expected.items() <= environment.items()


def test_sizes_must_fit_blocks_of_32(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--sizes", "33"])
    assert "multiple of 32" in capsys.readouterr().err


def test_comparison_is_old_over_new():
    old, new = fake_report(fake_result(native=3.0)), fake_report(fake_result(native=2.0))
    new.machine["cpu"] = "b"
    text = text_of(print_comparison, new, old)
    assert "Not the same cpu: a then, b now" in text
    assert "1.50" in text


def test_targets_tell_the_mean_from_single_cases():
    fast, slow = fake_result(apple=40.0), fake_result(apple=10.0)
    for isa, results, met in (
        ("avx512", [fast, slow], "yes"),  # 20 on average, 10 at least; wanted 18 and 8
        ("avx512", [fake_result(apple=100.0), fake_result(apple=7.0)], "on average"),
        ("avx512", [slow], "no"),
        ("avx2", [slow], "yes"),
    ):
        (row,) = targets.evaluate(results, isa)
        assert row["met"] == met
    assert targets.evaluate([fake_result()], "avx512") == []


def test_plot_of_single_cases(tmp_path):
    # Ratios whose geometric mean, of one value, comes out greater or less than the value.
    results = [fake_result(apple=5.0 + i / 7) for i in range(4)]
    for number, result in enumerate(results):
        save_plot(fake_report(result), tmp_path / f"{number}.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_floor_follows_the_copy():
    result = fake_result(native=1.0)
    assert result.floor_seconds == pytest.approx(0.5)  # as many bytes as the copy moves
    assert result.share_of_floor == pytest.approx(0.5)


def test_contenders_take_turns():
    order: list[str] = []
    case = Case("fake_quantize", "int8", "tensor", 32, "fp32", 1)
    contenders = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    result = measure(case, Bench(dict(contenders), 1.0), Effort(2, 1e-9), warm=True)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 3  # once to estimate, twice to measure
    assert set(result.seconds) == {COPY, "a", "b"}


def test_what_is_not_supported_becomes_a_note():
    def fail():
        raise NotImplementedError("no such kernel")

    bench = Bench({}, 1.0)
    add_if_supported(bench, "torch", fail)
    assert bench.contenders == {}
    assert bench.notes == ["torch: no such kernel"]


def test_peak_counts_temporaries_and_held_the_result():
    def call() -> torch.Tensor:
        return torch.ones(1000) + torch.ones(1000)

    held, peak = held_and_peak_bytes(call)
    assert held == 4000
    assert peak == 12000


def test_geometric_mean():
    assert geometric_mean([1, 4]) == pytest.approx(2)
    assert math.isnan(geometric_mean([]))


FAKE_PACKAGE = """
import torch
class CompressionTargetTensor: WEIGHT = ACTIVATION = None
class PerTensorGranularity: pass
class PerChannelGranularity: pass
class PerBlockGranularity: pass
class QuantizationSpec:
    def __init__(self, dtype, **rest):
        if dtype == "int4":
            raise ValueError("not today")
class QuantizationComponentFactory:
    construct = staticmethod(lambda spec, target: torch.nn.Identity())
"""


@pytest.fixture
def other_package(tmp_path):
    """A stand-in for Apple's package, which need not be installed."""
    for module in ("", "config", "config/spec", "quantization", "quantization/spec"):
        folder = tmp_path / "coreai_opt" / module
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "__init__.py").write_text(FAKE_PACKAGE if module.endswith("spec") else "print('hello')")
    return tmp_path


def test_the_worker_runs_the_other_package(other_package):
    case = Case("simulator", "int8", "tensor", 32, "fp32", 1, TRAINING, "static")
    with Apple(other_package) as apple:
        assert len(apple.prepare(case, with_digest=True)) == 32
        assert apple.sample(TRAINING, 3, untimed_call=True) > 0
        assert apple.memory(case)["saved_per_element"] <= 0
        with pytest.raises(AppleError, match="not today"):
            apple.prepare(Case("simulator", "int4", "tensor", 32, "fp32", 1, TRAINING, "static"))
        apple.release()
        with pytest.raises(AppleError, match="nothing was prepared"):
            apple.sample(TRAINING, 1, untimed_call=False)


def test_a_missing_package_is_an_error_that_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install"):
        Apple(tmp_path)


def test_local_contender_is_timed_inside_its_context():
    entered = []

    class Context:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *_):
            entered.append(False)

    assert Local(lambda: entered.append("call"), Context).sample(1, untimed_call=True) >= 0
    assert entered == [True, "call", "call", False]
