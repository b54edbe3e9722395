import pytest

from coreai_opt.inspection import BoundaryEdge, InputEdge, ModuleInfo, OpInfo


def op(name: str, op_type: str | None = "add") -> OpInfo:
    return OpInfo(name, op_type, (), (), (), {}, False)


def test_operations_are_equal_by_name_and_the_name_stays():
    first, second = op("a"), op("a", "mul")
    assert first == second
    assert hash(first) == hash("a")
    assert len({first, second, op("b")}) == 2
    assert first != "a"
    with pytest.raises(AttributeError, match="'a' cannot be changed"):
        first.op_name = "b"
    with pytest.raises(AttributeError, match="'a' cannot be deleted"):
        del first.op_name
    first.op_type = "sub"
    assert repr(first) == "OpInfo(op_name='a', op_type='sub')"


def test_an_edge_shows_its_producer():
    state = OpInfo("fc.weight", None, (), (), (), {0: (op("linear"),)}, True)
    edge = InputEdge(state, None)
    assert (edge.op_name, edge.op_type, edge.is_state, edge.module_stack, edge.inputs) == (
        "fc.weight",
        None,
        True,
        (),
        (),
    )
    assert edge.outputs == {0: (op("linear"),)}
    with pytest.raises(AttributeError):
        edge.output_idx = 1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        BoundaryEdge(state, 0).index = 1  # type: ignore[misc]


def test_modules_are_walked_depth_first():
    leaf = ModuleInfo("a.b", "B", ops=[op("inner")])
    middle = ModuleInfo("a", "A", {"a.b": leaf}, [op("outer")])
    root = ModuleInfo("", "Root", {"a": middle, "c": ModuleInfo("c", "C", ops=[op("last")])}, [op("first")])
    assert [name for name, _ in root.named_modules()] == ["", "a", "a.b", "c"]
    assert [name for name, _ in root.named_children()] == ["a", "c"]
    assert [module.module_name for module in root.children()] == ["a", "c"]
    assert [each.op_name for each in root.all_ops()] == ["first", "outer", "inner", "last"]
    assert root.get_submodule("") is root
    assert root.get_submodule("a.b") is leaf
    with pytest.raises(KeyError, match="'b'"):
        root.get_submodule("b")
