"""Deprecated names of enum members, as attributes, as values and in files."""

import copy
import io
import pickle

import pytest

import coreai_opt
from coreai_opt import ExportBackend
from coreai_opt.quantization import QuantizerConfig
from coreai_opt.quantization.config import ExecutionMode

RENAMED = [
    (ExportBackend, "MIL", ExportBackend.CoreML),
    (ExportBackend, "MLIR", ExportBackend.CoreAI),
    (ExportBackend, "_TORCH", ExportBackend.Torch),
    (ExecutionMode, "PT2E", ExecutionMode.GRAPH),
]


def test_members_have_the_names_and_order_of_the_api():
    assert [(each.name, each.value) for each in ExportBackend] == [
        ("Torch", "torch"),
        ("CoreML", "coreml"),
        ("CoreAI", "coreai"),
    ]
    assert list(ExportBackend.__members__) == ["Torch", "CoreML", "CoreAI"]
    assert [each.value for each in ExecutionMode] == ["graph", "eager"]


@pytest.mark.parametrize(("enum", "old", "member"), RENAMED, ids=[each[1] for each in RENAMED])
@pytest.mark.parametrize("spelling", [str, str.lower, str.capitalize])
def test_old_names_resolve_with_one_warning_that_points_at_the_caller(enum, old, member, spelling):
    for find in (lambda: getattr(enum, spelling(old)), lambda: enum(spelling(old))):
        with pytest.warns(DeprecationWarning, match=f"is deprecated.*{member.name} now") as said:
            assert find() is member
        assert len(said) == 1
        assert said[0].filename == __file__


def test_the_old_name_of_an_execution_mode_in_configurations_and_files():
    text = "quantization_config: {execution_mode: PT2E}"
    for build in (
        lambda: QuantizerConfig(execution_mode="pt2e"),
        lambda: QuantizerConfig(execution_mode="eager").set_execution_mode("PT2E"),
        lambda: QuantizerConfig.from_yaml(io.StringIO(text)),
    ):
        with pytest.warns(DeprecationWarning, match=r"ExecutionMode\.GRAPH now"):
            assert build().execution_mode is ExecutionMode.GRAPH


@pytest.mark.parametrize("enum", [ExportBackend, ExecutionMode])
def test_what_never_was_a_member_is_refused(enum):
    with pytest.raises(AttributeError, match=f"{enum.__name__} has no member 'ONNX'; its members: "):
        _ = enum.ONNX
    assert not hasattr(enum, "__missing__")
    for value in ("onnx", None, 3):
        with pytest.raises(ValueError, match=f"is not a valid {enum.__name__}"):
            enum(value)


def test_members_survive_copies_and_pickles():
    for member in (*ExportBackend, *ExecutionMode):
        assert copy.deepcopy(member) is member
        assert pickle.loads(pickle.dumps(member)) is member


def test_the_backend_is_also_a_name_of_the_package():
    assert coreai_opt.ExportBackend is ExportBackend
