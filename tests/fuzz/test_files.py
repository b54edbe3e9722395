"""Files that are damaged, or written by someone who means harm: an error says so, and nothing else happens.

FUZZ_EXAMPLES: files of each kind (default 60).
"""

import contextlib
import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import coreai_opt.export
from coreai_opt import _prepared_models
from coreai_opt.controllers import ControllerConfig
from coreai_opt.palettization import KMeansPalettizerConfig
from coreai_opt.palettization.kmeans._sensitivities import load_sensitivities
from coreai_opt.pruning import MagnitudePrunerConfig
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerChannelGranularity, QuantizationSpec

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What from_yaml, from_dict and from_file say that they raise; a ValidationError is a ValueError.
DOCUMENTED = (ValueError, TypeError, RuntimeError, KeyError, yaml.YAMLError)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["int4", "weight", "*", "builtins.eval", "os.system", "torch.nn.Linear", "(", "[a-z", "per_tensor"]
    ),
)
data = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Plain data like ``value``, with one place of it replaced, left out or renamed."""
    value = copy.deepcopy(value)
    at, parent, key = value, None, None
    while isinstance(at, dict | list) and at and (parent is None or draw(st.integers(0, 4))):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        parent, key = at, draw(st.sampled_from(keys))
        at = parent[key]
    if parent is None:
        return draw(data)
    action = draw(st.sampled_from(["replace", "remove", "rename"]))
    if action == "replace":
        parent[key] = draw(data)
    else:
        taken = parent.pop(key)
        if action == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = taken
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes like these: cut off, or with some of them changed, put in or left out."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(result) - 1))
        result[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(result)


def allowed(call: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
    """The call succeeds, or raises one of these."""
    with contextlib.suppress(*errors):
        call()


CONFIGURATIONS = (QuantizerConfig, MagnitudePrunerConfig, KMeansPalettizerConfig)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGURATIONS, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore")
def test_configurations_of_other_content(kind: Any, tmp_path: Path) -> None:
    plain = yaml.safe_load(kind().to_yaml())

    @many
    @given(changed(plain))
    def check(content: Any) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        allowed(lambda: kind.from_yaml(path), DOCUMENTED)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
@pytest.mark.filterwarnings("ignore")
def test_controllers_configurations_of_other_content(name: str, tmp_path: Path) -> None:
    plain = {
        "input_info": {"sample_size": [1, 8]},
        "compression": [
            {"algorithm": "quantization", "weights": {"bits": 4}},
            {"algorithm": "magnitude_sparsity"},
        ],
    }

    @many
    @given(changed(plain))
    def check(content: Any) -> None:
        path = tmp_path / name
        text = json.dumps(content) if name.endswith("json") else yaml.safe_dump(content, allow_unicode=True)
        path.write_text(text, encoding="utf-8")
        allowed(lambda: ControllerConfig.from_file(path), DOCUMENTED)

    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_text(tmp_path: Path) -> None:
    content = QuantizerConfig.presets.w4().to_yaml().encode()

    @many
    @given(damaged(content))
    def check(content: bytes) -> None:
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        allowed(lambda: QuantizerConfig.from_yaml(path), DOCUMENTED)

    check()


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [
        "quantization_config:\n  global_config: &a\n    op_state_spec: *a\n",
        "quantization_config: &a {global_config: *a}",
        LAUGHS + "quantization_config: {global_config: *a29}",
        "quantization_config: " + "[" * 400 + "]" * 400,
        "quantization_config: " + "{a: " * 200 + "}" * 200,
        "quantization_config: {global_config: !!bool maybe}",
        "quantization_config: {global_config: !!timestamp never}",
        "quantization_config: {global_config: !!int ''}",
    ],
    ids=["itself", "itself in flow", "laughs", "deep list", "deep dict", "bool", "timestamp", "int"],
)
def test_yaml_that_would_never_end(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"levels deep|contains itself|more than|does not fit"):
        QuantizerConfig.from_yaml(path)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system ''"]
)
def test_yaml_makes_no_objects(text: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = tmp_path / "config.yaml"
    path.write_text(f"quantization_config: {text.format(made)}")
    with pytest.raises(yaml.YAMLError):
        QuantizerConfig.from_yaml(path)
    assert not made.exists()


def test_a_class_in_a_file_is_one_that_was_registered() -> None:
    spec = {"dtype": "int4", "fake_quantize_cls": "os.system"}
    fields = {"global_config": {"op_state_spec": {"weight": spec}}}
    with pytest.raises(ValueError, match=r"os\.system"):
        QuantizerConfig.from_dict({"quantization_config": fields})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    config = QuantizerConfig.presets.w4(execution_mode="eager")
    prepared = Quantizer(model(), config).prepare((torch.randn(2, 8),))
    return coreai_opt.save_checkpoint(prepared, path).read_bytes()


def load(content: bytes, path: Path) -> None:
    """Loads, or raises what is documented and leaves the model as it was."""
    path.write_bytes(content)
    fresh = model()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    try:
        coreai_opt.load_checkpoint(fresh, path)
    except (ValueError, RuntimeError, TypeError):
        assert not _prepared_models.is_prepared(fresh)
        after = fresh.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints(checkpoint: bytes, tmp_path: Path) -> None:
    @many
    @given(damaged(checkpoint))
    def check(content: bytes) -> None:
        load(content, tmp_path / "model.safetensors")

    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_checkpoints_that_say_something_else(checkpoint: bytes, tmp_path: Path) -> None:
    (length,) = struct.unpack("<Q", checkpoint[:8])
    header, tensors = json.loads(checkpoint[8 : 8 + length]), checkpoint[8 + length :]
    description = json.loads(header["__metadata__"]["coreai_opt"])

    @many
    @given(changed(description))
    def check(content: Any) -> None:
        header["__metadata__"]["coreai_opt"] = json.dumps(content)
        text = json.dumps(header).encode()
        load(struct.pack("<Q", len(text)) + text + tensors, tmp_path / "model.safetensors")

    check()


@pytest.mark.slow
def test_damaged_sensitivities(tmp_path: Path) -> None:
    path = tmp_path / "sensitivities.pt"
    torch.save({"weight": torch.rand(4, 4)}, path)
    content = path.read_bytes()

    @many
    @given(damaged(content))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        allowed(lambda: load_sensitivities(path), (ValueError, TypeError))

    check()


def test_a_pickle_of_code_is_no_file_of_sensitivities(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"weight": Harm()}, tmp_path / "sensitivities.pt")
    with pytest.raises(ValueError, match="damaged, or no file of tensors"):
        load_sensitivities(tmp_path / "sensitivities.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_quantized_checkpoints_of_other_content(tmp_path: Path) -> None:
    """A configuration of compressed-tensors, changed: it is read, or an error says why not."""
    weight = {"op_state_spec": {"weight": QuantizationSpec(granularity=PerChannelGranularity(axis=0))}}
    only_weights = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, **weight)
    net = model()
    Quantizer(net, QuantizerConfig(global_config=only_weights, execution_mode="eager")).prepare(
        (torch.randn(2, 8),)
    )
    saved = coreai_opt.export.save(net, tmp_path / "model.safetensors", (torch.randn(2, 8),), progress=False)
    with safe_open(saved.path, framework="pt") as file:
        plain = json.loads(file.metadata()["quantization_config"])
    tensors = load_file(saved.path)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")

    @many
    @given(changed(plain))
    def check(content: Any) -> None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": content}))
        allowed(
            lambda: coreai_opt.export.load_checkpoint(model(), folder), (ValueError, TypeError, RuntimeError)
        )

    check()
