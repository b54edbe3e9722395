"""The engine under Apple's package, in processes that import Apple's: switching, copies, subclasses, counts.

That results are the same bit for bit is tested in tests/parity/test_accelerated.py.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from coreai_kernels import native
from tests import forked
from tests.parity import oracle

KERNELS = oracle.ROOT / "kernels"

pytestmark = [
    pytest.mark.skipif(not oracle.find(), reason=oracle.INSTALL),
    pytest.mark.skipif(native.extension is None, reason="without a compiled library Apple's methods run"),
]

PRELUDE = f"""
import copy, pickle, sys, warnings
warnings.simplefilter("ignore")
sys.path.append({str(oracle.ROOT)!r})
from tests.parity.torchao_patterns import keep_copies, keep_traces
keep_traces()
import torch
from torch import nn
import coreai_opt, coreai_accelerate
keep_copies()
coreai_accelerate.disable()  # where the distribution is installed, the import has activated it
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig

def simulators(model):
    return [each for each in model.modules() if hasattr(each, "fake_quant_enabled")]

def trained(mode="eager", steps=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    quantizer = Quantizer(model, QuantizerConfig(execution_mode=mode))
    model = quantizer.prepare((torch.randn(2, 8),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with quantizer.training_mode():
        for _ in range(steps):
            loss = model(torch.randn(5, 8)).square().sum()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    return model, loss.item()
"""


def run(script: str, **environment: str) -> list[str]:
    paths = [str(oracle.FOLDER), str(KERNELS)]
    done = forked.run(textwrap.dedent(script), PRELUDE, paths, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_training_is_the_same_and_runs_on_the_engine() -> None:
    script = """
    from coreai_opt.inspection import bits_per_weight
    other, alone = trained(steps=12)
    coreai_accelerate.activate()
    model, found = trained(steps=12)
    print(vars(bits_per_weight(model)) == vars(bits_per_weight(other)))
    status = coreai_accelerate.status()
    print(alone == found, status.is_active, status.fast_path["hits"] > 20, len(status.replaced))
    print({type(each).__name__ for each in simulators(model)} == {"FusedFakeQuantize"})
    """
    assert run(script) == ["True"] * 4 + ["3", "True"]


def test_calibration_dynamic_activations_and_compiled_programs() -> None:
    script = """
    coreai_accelerate.activate()
    from coreai_accelerate import quantization
    from coreai_opt.config.spec import CompressionTargetTensor
    from coreai_opt.quantization.spec import QuantizationComponentFactory

    engine, calls = quantization.observe_and_fake_quantize, []
    for name in ("observe", "apply"):
        given = getattr(engine, name)
        setattr(engine, name, lambda *a, given=given, name=name: calls.append(name) or given(*a))

    def made(**fields):
        target = CompressionTargetTensor.ACTIVATION
        one = QuantizationComponentFactory.construct(QuantizationSpec(**fields), target)
        one(torch.randn(3, 8))
        return one

    calibrated, x = made(), torch.randn(3, 8)
    calibrated.disable_fake_quant()
    print(calibrated(x) is x, calls)
    dynamic = made(qparam_calculator_cls="dynamic")
    dynamic(torch.randn(5, 8))
    dynamic.disable_fake_quant()
    print(dynamic(x) is x, calls)
    print(set(coreai_accelerate.status().fallbacks) == {"first observation"})
    expected = calibrated.enable_fake_quant() or calibrated.disable_observer() or calibrated(x)
    print(torch.equal(torch.compile(calibrated, backend="eager")(x), expected))
    print(coreai_accelerate.status().fallbacks["compiled or exported program"] > 0)
    """
    seen = "True ['observe'] True ['observe', 'apply', 'observe'] True True True"
    assert " ".join(run(script)) == seen


def test_disabled_by_the_environment() -> None:
    script = """
    coreai_accelerate.activate()
    model, _ = trained()
    print(coreai_accelerate.status().is_active, {type(each).__name__ for each in simulators(model)})
    """
    assert run(script, COREAI_ACCELERATE="0") == ["False", "{'_DefaultFakeQuantizeImpl'}"]


def test_disabled_by_a_call_old_simulators_run_apples_methods() -> None:
    script = """
    coreai_accelerate.activate()
    model, _ = trained()
    x = torch.randn(5, 8)
    before = model(x)
    coreai_accelerate.disable()
    hits = coreai_accelerate.status().fast_path["hits"]
    print(torch.equal(model(x), before), coreai_accelerate.status().fast_path["hits"] == hits)
    print({type(each).__name__ for each in simulators(trained()[0])})
    """
    assert run(script) == ["True", "True", "{'_DefaultFakeQuantizeImpl'}"]


def test_copies_and_pickles() -> None:
    script = """
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
    coreai_accelerate.activate()
    model, _ = trained()
    x = torch.randn(5, 8)
    with torch.no_grad():
        other = copy.deepcopy(model)
        print(torch.equal(other(x), model(x)))
        from coreai_opt.config.spec import CompressionTargetTensor
        from coreai_opt.quantization.spec import QuantizationComponentFactory
        one = QuantizationComponentFactory.construct(QuantizationSpec(), CompressionTargetTensor.WEIGHT)
        w = torch.randn(16, 8)
        for _ in range(3): one(w)
        again = pickle.loads(pickle.dumps(one))
        print(torch.equal(again(w), one(w)), isinstance(again, FakeQuantizeImplBase))
    """
    assert run(script) == ["True", "True", "True"]


def test_subclasses_keep_their_methods() -> None:
    script = """
    coreai_accelerate.activate()
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
    called = []

    @FakeQuantizeImplBase.register("mine")
    class Mine(type(simulators(trained()[0])[0])):
        def _fused_fake_quant_dequant(self, *args, **kwargs):
            called.append(1)
            return super()._fused_fake_quant_dequant(*args, **kwargs)

    spec = QuantizationSpec(fake_quantize_cls="mine")
    layers = ModuleQuantizerConfig(op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None)
    model = nn.Linear(4, 4)
    config = QuantizerConfig(global_config=layers, execution_mode="eager")
    model = Quantizer(model, config).prepare((torch.ones(1, 4),))
    called.clear()
    for _ in range(3): model(torch.ones(1, 4))
    print(len(called), coreai_accelerate.status().fallbacks["methods"] > 0)
    """
    assert run(script) == ["3", "True"]


def test_a_patched_calculator_is_called() -> None:
    script = """
    coreai_accelerate.activate()
    model, _ = trained()
    simulator = simulators(model)[0]
    simulator.enable_observer()
    x = torch.randn(5, 8)
    for _ in range(3): simulator(x)
    called, given = [], simulator.qparams_calculator.compute_qparams
    simulator.qparams_calculator.compute_qparams = lambda *a, **k: called.append(1) or given(*a, **k)
    simulator(x)
    print(len(called))
    simulator.qparams_calculator.register_forward_hook(lambda *_: called.append(2))
    simulator(x)
    print(called)
    """
    assert run(script) == ["1", "[1,", "1,", "2]"]


@pytest.mark.parametrize("part", ["qparams_calculator", "qparams_calculator.range_calculator"])
def test_a_calculator_that_gets_another_class_is_that_classs(part: str) -> None:
    script = f"""
    coreai_accelerate.activate()
    model, _ = trained()
    simulator = simulators(model)[0]
    simulator.enable_observer()
    x = torch.randn(5, 8)
    for _ in range(4): simulator(x)
    hits, called = coreai_accelerate.status().fast_path["hits"], []
    simulator(x)
    found = simulator.get_submodule("{part}")
    class Mine(type(found)):
        def forward(self, *args):
            called.append(1)
            return super().forward(*args)
    found.__class__ = Mine
    before = coreai_accelerate.status().fast_path["hits"]
    simulator(x)
    simulator(x)
    print(before - hits, coreai_accelerate.status().fast_path["hits"] - before, called)
    """
    assert run(script) == ["1", "0", "[1,", "1]"]


def test_tensors_that_torch_swaps_are_not_held() -> None:
    script = """
    coreai_accelerate.activate()
    torch.__future__.set_swap_module_params_on_conversion(True)
    model, _ = trained()
    x, state = torch.ones(5, 8), copy.deepcopy(model.state_dict())
    expected = [model(x) for _ in range(3)]
    model.load_state_dict(state)
    first = model(x)
    model.double().float()
    print(torch.equal(first, expected[0]), torch.equal(model(x), first))
    """
    assert run(script) == ["True", "True"]


def test_buffers_that_are_ones_no_more_are_apples_to_treat() -> None:
    script = """
    def losses(name, how):
        model, _ = trained()
        simulator = next(s for s in simulators(model) if hasattr(s.qparams_calculator, "running_max"))
        simulator.enable_observer()
        x = torch.linspace(-1, 1, 8)[None].repeat(5, 1)
        for _ in range(3): simulator(x)
        calculator = simulator.qparams_calculator
        value = getattr(calculator, name) * 2
        delattr(calculator, name)
        if how != "gone": setattr(calculator, name, nn.Parameter(value) if how == "parameter" else value)
        try: return [simulator(x).tolist() for _ in range(2)]
        except AttributeError as error: return str(error)
    names, ways = ("scale", "running_min", "running_max"), ("parameter", "attribute", "gone")
    cases = [(name, how) for name in names for how in ways]
    expected = [losses(*case) for case in cases]
    coreai_accelerate.activate()
    print([losses(*case) for case in cases] == expected, [type(each).__name__ for each in expected])
    """
    found = run(script)
    assert found[0] == "True", found


def test_quantized_ranges_of_ones_own() -> None:
    script = """
    from coreai_opt.config.spec import CompressionTargetTensor
    from coreai_opt.quantization.spec import QuantizationComponentFactory
    x = torch.linspace(-2, 3, 65)[None]
    def outputs():
        for dtype, scheme, low, high in (
            ("int8", "symmetric_with_clipping", -127, 5),
            ("int4", "symmetric", -8, 4),
            ("uint8", "symmetric", 0, 6),
            ("int8", "asymmetric", -9, 100),
            (torch.float8_e4m3fn, "symmetric", -100, 448),
            ("uint4", "symmetric", -3, 9),
        ):
            spec = QuantizationSpec(dtype=dtype, qscheme=scheme)
            made = QuantizationComponentFactory.construct(spec, CompressionTargetTensor.ACTIVATION)
            made(x)
            for each in (made, made.qparams_calculator): each.quant_min, each.quant_max = low, high
            try: yield [made(x).tolist() for _ in range(3)], made.qparams_calculator.scale.tolist()
            except AssertionError as error: yield str(error)
    expected = list(outputs())
    coreai_accelerate.activate()
    print(list(outputs()) == expected, [type(each).__name__ for each in expected])
    print(coreai_accelerate.status().fallbacks["range of the quantized values"])
    """
    assert run(script) == ["True", "['tuple',", *["'tuple',"] * 4, "'str']", "1"]


def test_pruning_and_palettes() -> None:
    script = """
    from coreai_opt.palettization import KMeansPalettizer
    from coreai_opt.pruning import MagnitudePruner

    def compressed(compressor):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32))
        compressor(model).prepare((torch.randn(2, 64),))
        return model[0].weight.detach()

    alone = [compressed(each) for each in (MagnitudePruner, KMeansPalettizer)]
    coreai_accelerate.activate()
    found = [compressed(each) for each in (MagnitudePruner, KMeansPalettizer)]
    print(torch.equal(alone[0], found[0]), (alone[1] - found[1]).abs().max().item() < 1e-7)
    """
    assert run(script)[-2:] == ["True", "True"]


def test_masks_are_the_engines_and_apples() -> None:
    script = """
    import coreai_kernels
    from coreai_opt.pruning import MagnitudePruner
    from coreai_opt.pruning.spec import ChannelStructured, PruneImplBase, Unstructured

    apple, calls = PruneImplBase.REGISTRY["default"], []
    for name in ("topk_mask", "channel_mask"):
        given = getattr(coreai_kernels, name)
        setattr(coreai_kernels, name, lambda *a, given=given, **k: calls.append(1) or given(*a, **k))
    coreai_accelerate.activate()
    model = MagnitudePruner(nn.Sequential(nn.Linear(64, 32))).prepare((torch.randn(2, 64),))
    (simulator,) = [each for each in model.modules() if isinstance(each, apple)]
    print(type(simulator).__name__, len(calls), coreai_accelerate.status().fallbacks)

    def outcome(cls, *args):
        try:
            return cls.compute_mask(*args)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    same = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.complex64):
        weight = (torch.randperm(64 * 33 * 5).view(64, 33, 5) - 2999.75).to(dtype)
        if dtype in (torch.float16, torch.bfloat16):  # whose magnitudes tie, but for powers of two
            weight = (2.0 ** (torch.randperm(24).view(4, 6) - 12)).to(dtype)
        for scheme in (Unstructured(), *(ChannelStructured(axis=axis) for axis in (0, -1, 7))):
            for sparsity in (0.0, 0.3, 0.5, 0.99, 1.0):
                one, other = (outcome(cls, weight, sparsity, scheme) for cls in (apple, type(simulator)))
                same.append(torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other)
    print(all(same), len(same))
    print(*sorted(coreai_accelerate.status().fallbacks), sep=", ")
    """
    left = "axis, channels of bfloat16, channels of float16, complex64, float64, int32"
    assert " ".join(run(script)) == f"FusedMagnitudePrune 1 {{}} True 120 {left}"


CONFIGURATIONS = """
    def kind(config):
        model = Quantizer(nn.Sequential(nn.Linear(8, 16)), config).prepare((torch.randn(2, 8),))
        return {type(each).__name__ for each in simulators(model)}
"""


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_configurations_are_apples_with_and_without_the_plugin(mode: str) -> None:
    script = f"""
    {CONFIGURATIONS}
    before = QuantizerConfig(execution_mode="{mode}")
    coreai_accelerate.activate()
    during = QuantizerConfig(execution_mode="{mode}")
    print(kind(before), kind(during), before == during, QuantizationSpec() == QuantizationSpec())
    coreai_accelerate.disable()
    again = QuantizerConfig.from_dict(during.to_dict())
    print(kind(before), kind(during), kind(again), kind(pickle.loads(pickle.dumps(during))), again == before)
    """
    fused, apples = "{'FusedFakeQuantize'}", "{'_DefaultFakeQuantizeImpl'}"
    assert run(script) == [fused, fused, "True", "True", *[apples] * 4, "True"]


def test_registries_stay_the_users() -> None:
    script = """
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
    import inspect
    registry, apple = FakeQuantizeImplBase.REGISTRY, FakeQuantizeImplBase.REGISTRY["default"]
    before, arguments = dict(registry), inspect.signature(apple)
    coreai_accelerate.activate()
    print(dict(registry) == before, inspect.signature(apple) == arguments)
    class Other:
        def __new__(cls, *args, **kwargs):
            made.append(cls)
            return super().__new__(cls)
    class Both(apple, Other):
        pass
    made, model = [], trained()[0]
    Both.__new__(Both)
    print(made == [Both], type(simulators(model)[0]._replicate_for_data_parallel()).__name__)
    class Mine(apple):
        pass
    registry["default"] = registry["apple"] = Mine
    coreai_accelerate.disable()
    print(registry["default"] is Mine, registry["apple"] is Mine)
    """
    assert run(script) == ["True", "True", "True", "FusedFakeQuantize", "True", "True"]


def test_pickles_are_apples(tmp_path: Path) -> None:
    """They load without the engine, and those that were made without it run on it."""
    script = f"""
    from coreai_opt.config.spec import CompressionTargetTensor
    from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
    from coreai_opt.pruning.spec import PruneImplBase, Unstructured
    from coreai_opt.quantization.spec import QuantizationComponentFactory
    coreai_accelerate.activate()
    made = [
        QuantizationComponentFactory.construct(QuantizationSpec(), CompressionTargetTensor.WEIGHT),
        PruneImplBase.REGISTRY["default"](0.5, Unstructured()),
    ]
    weight = torch.linspace(-1, 1, 128).view(16, 8)
    for _ in range(3): expected = [each(weight) for each in made]
    print(*(type(each).__name__ for each in made))
    torch.save([pickle.dumps(each) for each in made] + expected, {str(tmp_path / "made.pt")!r})
    again = [pickle.loads(pickle.dumps(each, protocol)) for each in made for protocol in (0, 2, 5)]
    print({{type(each) for each in again}} == {{type(each) for each in made}})
    coreai_accelerate.disable()
    print({{type(copy.deepcopy(each)) for each in made}} == {{type(each).__mro__[1] for each in made}})
    """
    assert run(script) == ["FusedFakeQuantize", "FusedMagnitudePrune", "True", "True"]
    code = f"""
import pickle, torch, coreai_opt
one, two, *expected = torch.load({str(tmp_path / "made.pt")!r}, weights_only=False)
weight = torch.linspace(-1, 1, 128).view(16, 8)
for each, found in zip((one, two), expected):
    each = pickle.loads(each)
    print(type(each).__name__, torch.equal(each(weight), found))
"""
    without = {**os.environ, "PYTHONPATH": str(oracle.FOLDER), "COREAI_ACCELERATE": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=without, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["_DefaultFakeQuantizeImpl", "True", "_MagnitudePruneImpl", "True"], (
        done.stderr
    )


def test_buffers_in_float64_go_to_apples_method() -> None:
    script = """
    from coreai_opt.config.spec import CompressionTargetTensor
    from coreai_opt.quantization.spec import QuantizationComponentFactory
    found = []
    for active in (False, True):
        if active: coreai_accelerate.activate()
        torch.manual_seed(0)
        spec = QuantizationSpec(dtype=torch.uint8, qscheme="asymmetric", qformulation="minval")
        one = QuantizationComponentFactory.construct(spec, CompressionTargetTensor.ACTIVATION)
        for _ in range(3): one(torch.randn(16, 64))
        one.double().disable_observer()
        found.append(torch.stack([one(torch.randn(16, 64)) for _ in range(5)]))
    print(torch.equal(*found), coreai_accelerate.status().fallbacks["float64"])
    """
    assert run(script) == ["True", "5"]


def test_the_drop_in_beside_apples_package_is_told(tmp_path: Path) -> None:
    facts = tmp_path / "coreai_opt_fused-9.9.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: coreai-opt-fused\nVersion: 9.9\n")
    paths = os.pathsep.join([str(tmp_path), str(oracle.FOLDER), str(KERNELS)])
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import coreai_opt, coreai_accelerate; coreai_accelerate.activate()"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "coreai-opt-fused 9.9 is installed beside Apple's coreai-opt" in done.stderr
    assert "To fix: pip uninstall coreai-opt coreai-opt-fused" in done.stderr


def test_a_wrong_value_of_the_variable_is_an_error() -> None:
    script = """
    try:
        coreai_accelerate.activate()
    except ValueError as error:
        print("COREAI_ACCELERATE must be 0 or 1" in str(error))
    """
    assert run(script, COREAI_ACCELERATE="yes") == ["True"]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("import coreai_opt", "RuntimeError: coreai_opt is coreai-opt-fused"),
        (
            "import sys; sys.modules['coreai_opt'] = None",
            "ImportError: coreai_accelerate.activate needs Apple's",
        ),
    ],
)
def test_without_apples_package_it_says_what_is_wrong(package: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{package}; import coreai_accelerate; coreai_accelerate.activate()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(oracle.ROOT), str(KERNELS)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert message in done.stderr
    assert "To fix: pip " in done.stderr
