"""Compressed programs have the operations and constants of Apple's package, or come closer to the weights."""

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai_torch", reason="needs the extra coreai")

import torch

from . import compressed_programs
from .conftest import Oracle

# Ours computes in float32, Apple's package in float16: quotients near a half round differently.
HALVES = ("half-int8", "half-asymmetric", "half-fp8")
# Apple's package divides by another scale than it stores.
POWERS_OF_TWO = ("fp4", "fp8-power-of-two")
PALETTES = tuple(name for name in compressed_programs.CASES if name.startswith("palettes"))


@pytest.fixture(scope="module")
def theirs(asked_oracle: Oracle) -> dict[str, Any]:
    return asked_oracle.ask("coreai-utils", {"module": "compressed_programs"})


def ours(name: str) -> list[dict[str, Any]]:
    return compressed_programs.describe(compressed_programs.run(name))


@pytest.mark.parametrize(
    "name", [n for n in compressed_programs.CASES if n not in (*HALVES, *POWERS_OF_TWO, *PALETTES)]
)
def test_operations_and_constants_are_equal(name: str, theirs: dict[str, Any]) -> None:
    assert ours(name) == theirs[name]


def structure(description: list[dict[str, Any]]) -> list[Any]:
    return [
        (op["name"], op["types"], [each[0] if isinstance(each, tuple) else each for each in op["operands"]])
        for op in description
    ]


def numbers(constant: tuple[str, Any]) -> np.ndarray:
    """The values of a constant of a described program."""
    kind, values = constant
    shape_text, element = kind.removeprefix("tensor<").removesuffix(">").rsplit("x", 1)
    shape = [int(size) for size in shape_text.split("x")]
    if isinstance(values, str):
        if values.startswith("dense<"):
            values = [
                float(each) for each in re.findall(r"-?\d[\d.e+-]*", values.split("<")[1].split(">")[0])
            ]
        else:
            values = decoded(bytes.fromhex(values), element, int(np.prod(shape)))
    return np.broadcast_to(np.array(values, np.float64).reshape(-1), np.prod(shape)).reshape(shape)


def decoded(raw: bytes, element: str, count: int) -> list[float]:
    if element == "f4E2M1FN":
        magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
        # Ours packs two in a byte, as the runtime reads them; Apple's package does not.
        if len(raw) * 2 == count:
            raw = bytes(code for byte in raw for code in (byte & 15, byte >> 4))
        return [magnitudes[code & 7] * (-1 if code & 8 else 1) for code in raw]
    width = int(element[2:])
    stream = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: count * width]
    codes = stream.reshape(count, width) @ (1 << np.arange(width))
    if element.startswith("si"):
        codes = np.where(codes >= 1 << (width - 1), codes - (1 << width), codes)
    return codes.tolist()


def restored(description: list[dict[str, Any]]) -> np.ndarray:
    """The weight that the operations of a program with one weight give back."""
    value: np.ndarray | None = None
    for op in description:
        operands = op["operands"]
        if op["name"] == "coreai.lut_to_dense":
            indices, lut = numbers(operands[0]), numbers(operands[1]).reshape(-1)
            value = lut[indices.astype(int)]
        elif op["name"] == "coreai.blockwise_shift_scale":
            data = numbers(operands[0]) if value is None else value
            scale, offset = (
                np.kron(numbers(each), np.ones(np.array(data.shape) // numbers(each).shape))
                for each in operands[1:3]
            )
            value = scale * (data - offset)
    assert value is not None
    return value


def weight(name: str) -> np.ndarray:
    torch.manual_seed(0)
    return (
        compressed_programs.MODELS[compressed_programs.CASES[name][0]][0]().l.weight.detach().double().numpy()
    )


@pytest.mark.parametrize("name", [*PALETTES, *POWERS_OF_TWO])
def test_operations_are_equal_and_weights_at_least_as_close(name: str, theirs: dict[str, Any]) -> None:
    mine = ours(name)
    assert structure(mine) == structure(theirs[name])
    exact = weight(name)
    error, other = (((restored(each) - exact) ** 2).sum() for each in (mine, theirs[name]))
    if name in POWERS_OF_TWO:
        assert error < other / 2
    elif compressed_programs.CASES[name][2][0] is None:
        # Apple's palettes are rounded to float16. Both are fitted to rounded weights.
        assert error <= other * (1 + 1e-6)
    else:
        # Rounding the palettes' own values to 8 bits goes either way.
        assert error <= other * 1.01


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_differs_in_roundings_alone(name: str, theirs: dict[str, Any]) -> None:
    mine = ours(name)
    assert structure(mine) == structure(theirs[name])
    exact = weight(name)
    error, other = (np.abs(restored(each) - exact).max() for each in (mine, theirs[name]))
    assert error <= other * 1.001
    differing = (restored(mine) != restored(theirs[name])).mean()
    assert 0 < differing < 0.05
