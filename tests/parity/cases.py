"""The cases: what is built, what goes in, and what is done with it. Data only, the same on every machine.

A full product over the axes that interact (`core_cases`), then samples in which every level of every axis
comes equally often (`sampled_cases`), and a few hand-written sequences (`sequence_cases`).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

__all__ = ["Case", "all_cases", "group_names"]

INT_DTYPES = ("int2", "int4", "int6", "int8", "uint2", "uint4", "uint6", "uint8")
# Symmetric with a zero point, if any; pairs of dtype and scale_dtype.
SYMMETRIC_DTYPES = (
    ("int8", "float8_e8m0fnu"),
    ("float8_e4m3fn", None),
    ("float8_e5m2", None),
    ("float4_e2m1fn", None),
    ("float8_e4m3fn", "float8_e8m0fnu"),
    ("float8_e5m2", "float8_e8m0fnu"),
    ("float4_e2m1fn", "float8_e8m0fnu"),
)
SCHEMES = ("symmetric", "symmetric_with_clipping", "asymmetric")
FORMULATIONS = ("zp", "minval")
CALCULATORS = ("static", "moving_average", "global_minmax", "dynamic")
INPUT_DTYPES = ("float32", "bfloat16", "float16")
SPECIALS = ("rows", "nan", "posinf", "neginf", "zeros", "subnormal", "huge", "tiny_range", "one_sided")
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "offset", "expanded")
GRADIENTS = ("contiguous", "transposed", "expanded", "special")

PER_TENSOR: dict[str, Any] = {"type": "per_tensor"}


def per_channel(axis: int | None) -> dict[str, Any]:
    return {"type": "per_channel", "axis": axis}


def per_block(block_size: int | tuple[int, ...], axis: int | None = None) -> dict[str, Any]:
    return {"type": "per_block", "axis": axis, "block_size": block_size}


@dataclass(frozen=True)
class Case:
    """One simulator and its life.

    Attributes:
        name: unique, and readable in a failure.
        group: the test that it belongs to.
        spec: keyword arguments of ``QuantizationSpec`` (dtypes and enums by name).
        target: ``weight`` or ``activation``.
        shape, input_dtype, layout: of the input tensors. A fresh input is drawn at every step.
        special: which exceptional values the inputs hold; empty for plain ones.
        gradient: layout of the upstream gradient, or ``special`` for one with NaN, inf and -0.0 in it.
        script: what is done, in order; `runner.ACTIONS` lists the words.
        seed: of the inputs and gradients.
        averaging_constant: set on the calculator before the first step.
    """

    name: str
    group: str
    spec: dict[str, Any]
    target: str
    shape: tuple[int, ...]
    input_dtype: str = "float32"
    layout: str = "contiguous"
    special: str = ""
    gradient: str = "contiguous"
    script: tuple[str, ...] = ("step", "step", "step", "observer_off", "step", "observer_on", "no_grad")
    seed: int = 0
    averaging_constant: float | None = None


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case, in a fixed order.

    Raises:
        ValueError: if two cases have the same name.
    """
    cases = (*core_cases(), *sampled_cases(1100), *large_cases(), *sequence_cases())
    if len({case.name for case in cases}) != len(cases):
        raise ValueError("two parity cases have the same name")
    return cases


def group_names() -> list[str]:
    """The groups in order of appearance."""
    return list(dict.fromkeys(case.group for case in all_cases()))


def _script(calculator: str) -> tuple[str, ...]:
    steps = ("step",) * (3 if calculator in ("moving_average", "global_minmax") else 2)
    return (*steps, "observer_off", "step", "observer_on", "no_grad")


def _target(wanted: str, calculator: str) -> str:
    return "activation" if calculator == "dynamic" else wanted


def _formats() -> Iterator[dict[str, Any]]:
    for dtype, scheme, formulation in product(INT_DTYPES, SCHEMES, FORMULATIONS):
        yield {"dtype": dtype, "qscheme": scheme, "qformulation": formulation}
    for dtype, scale_dtype in SYMMETRIC_DTYPES:
        yield {"dtype": dtype, "scale_dtype": scale_dtype}


def _format_name(spec: dict[str, Any]) -> str:
    parts = [spec["dtype"], spec.get("qscheme"), spec.get("qformulation"), spec.get("scale_dtype")]
    return "-".join(part for part in parts if part)


def core_cases() -> Iterator[Case]:
    """Format x calculator x input dtype x three granularities, on one small shape."""
    granularities = (PER_TENSOR, per_channel(0), per_block(5, axis=1))
    axes = product(_formats(), CALCULATORS, INPUT_DTYPES, granularities)
    for seed, (spec, calculator, input_dtype, granularity) in enumerate(axes):
        if not _accepted(spec, calculator):
            continue
        kind = granularity["type"]
        yield Case(
            name=f"core-{_format_name(spec)}-{calculator}-{input_dtype}-{kind}",
            group=f"core-{spec['dtype']}-{kind}",
            spec=spec | {"qparam_calculator_cls": calculator, "granularity": granularity},
            target=_target(("weight", "activation")[seed % 2], calculator),
            shape=(6, 35),
            input_dtype=input_dtype,
            script=_script(calculator),
            seed=seed,
        )


# Ranks 0 to 4, sizes that are no multiple of a vector, axes of size one.
SHAPES = (
    (),
    (1,),
    (27,),
    (64,),
    (5, 27),
    (27, 5),
    (1, 27),
    (33, 64),
    (12, 32),
    (4, 1, 6),
    (3, 27, 5),
    (2, 5, 64),
    (8, 4, 3, 3),
    (16, 6, 1, 1),
    (2, 8, 7, 9),
    (2, 4, 4, 12),
)
GRANULARITIES = (
    PER_TENSOR,
    per_channel(0),
    per_channel(1),
    per_channel(-1),
    per_channel(-2),
    per_block(1, axis=0),
    per_block(4, axis=1),
    per_block(3, axis=-1),
    per_block(32, axis=-1),
    per_block(2, axis=-2),
    per_block((1, 9)),
    per_block((-1, 8)),
    per_block((4, -1)),
    per_block((1, -1, 2)),
    per_block((2, 4, -1, -1)),
    per_block((-1, 2, 1, 3)),
    per_block(5, axis=-1),
    per_block(2, axis=0),
    per_block((3,)),
    per_block((1, 3, 5)),
    per_block((2, -1, 1)),
    per_block((4, 1, 3, 3)),
    per_block((1, -1, -1, 3)),
)
# These fit no tensor: the first two lack an axis, the last has one too many.
UNUSABLE = (per_channel(None), per_block(4), per_block((4,), axis=0))
FLOAT_RANGES: tuple[tuple[float | None, float | None], ...] = (
    (None, None),
    (-1.3, None),
    (None, 0.7),
    (-1.3, 2.1),
    (0, 0.1),
)


def sampled_cases(count: int, draw: int = 30) -> Iterator[Case]:
    """Cases that mix everything: each axis goes through its levels in shuffled rounds.

    One case in ten keeps a granularity that does not fit its shape: that is compared too.
    """
    rng = random.Random(draw)

    def rounds(levels: Sequence[Any]) -> Iterator[Any]:
        while True:
            order = list(levels)
            rng.shuffle(order)
            yield from order

    int_formats = rounds([spec for spec in _formats() if "qscheme" in spec])
    float_formats = rounds([spec for spec in _formats() if "qscheme" not in spec])
    calculators, granularities, shapes = rounds(CALCULATORS), rounds(GRANULARITIES), rounds(SHAPES)
    # Plain contiguous inputs are what people have: more of them.
    layouts, specials = rounds((*LAYOUTS, "contiguous")), rounds(("", "", *SPECIALS))
    gradients, input_dtypes, targets = map(rounds, (GRADIENTS, INPUT_DTYPES, ("weight", "activation")))
    float_ranges = rounds(((None, None), *FLOAT_RANGES))
    for seed in range(count):
        spec = next(float_formats if seed % 3 == 2 else int_formats)
        granularity, shape, calculator = next(granularities), next(shapes), next(calculators)
        if seed % 100 == 0:
            granularity = rng.choice(UNUSABLE)
        if seed % 10 and not _fits(granularity, shape):
            shape = rng.choice([other for other in SHAPES if _fits(granularity, other)])
        if seed % 10 and not _accepted(spec, calculator):
            calculator = rng.choice(CALCULATORS[:3])
        # A dynamic calculator takes no bounds.
        float_range = (None, None) if calculator == "dynamic" and seed % 10 else next(float_ranges)
        input_dtype, layout, special = next(input_dtypes), next(layouts), next(specials)
        size = "x".join(map(str, shape)) or "scalar"
        name = f"mixed{seed}-{_format_name(spec)}-{calculator}-{size}"
        yield Case(
            name=f"{name}-{input_dtype}-{layout}-{special or 'plain'}",
            group=f"mixed-{spec['dtype']}-{granularity['type']}",
            spec=spec
            | {
                "qparam_calculator_cls": calculator,
                "granularity": granularity,
                "float_range": list(float_range),
            },
            target=_target(next(targets), calculator),
            shape=shape,
            input_dtype=input_dtype,
            layout=layout,
            special=special,
            gradient=next(gradients),
            script=_script(calculator) + (() if calculator == "dynamic" else ("convert",)),
            seed=seed,
        )


def _fits(granularity: dict[str, Any], shape: tuple[int, ...]) -> bool:
    kind, axis, block = granularity["type"], granularity.get("axis"), granularity.get("block_size")
    if kind == "per_tensor":
        return True
    if isinstance(block, tuple):
        return len(block) == len(shape) and all(
            b == -1 or n % b == 0 for n, b in zip(shape, block, strict=True)
        )
    return (
        axis is not None and -len(shape) <= axis < len(shape) and (block is None or shape[axis] % block == 0)
    )


def _accepted(spec: dict[str, Any], calculator: str) -> bool:
    return calculator != "dynamic" or spec.get("qscheme") != "symmetric_with_clipping"


def large_cases() -> Iterator[Case]:
    """Large enough to be split among threads and to leave ragged ends."""
    granularities = (PER_TENSOR, per_channel(0), per_channel(1), per_block(32, axis=-1), per_block((8, 16)))
    axes = product(("int4", "uint8", "float8_e4m3fn", "float4_e2m1fn"), granularities, INPUT_DTYPES[:2])
    for seed, (dtype, granularity, input_dtype) in enumerate(axes):
        yield Case(
            name=f"large-{dtype}-{seed}-{input_dtype}",
            group=f"large-{dtype}",
            spec={"dtype": dtype, "granularity": granularity, "qparam_calculator_cls": CALCULATORS[seed % 4]},
            target="activation",
            shape=(64, 1056) if granularity != PER_TENSOR else (67, 1051),
            input_dtype=input_dtype,
            layout=("contiguous", "transposed", "offset")[seed % 3],
            script=("step", "step"),
            seed=seed,
        )


SEQUENCES: dict[str, tuple[str, ...]] = {
    "observer-off-first": ("observer_off", "step", "observer_on", "step"),
    "observer-toggles": (
        "step",
        "observer_off",
        "step",
        "step",
        "observer_on",
        "step",
        "observer_off",
        "step",
    ),
    "fake-quant-off": ("fake_quant_off", "step", "step", "fake_quant_on", "step"),
    "both-off": ("step", "fake_quant_off", "observer_off", "step", "fake_quant_on", "step"),
    "both-off-first": (
        "fake_quant_off",
        "observer_off",
        "step",
        "observer_on",
        "step",
        "fake_quant_on",
        "step",
    ),
    "no-gradient-wanted": ("plain", "plain", "observer_off", "plain", "step"),
    "eval": ("eval", "step", "train", "step", "eval", "observer_off", "step"),
    "no-grad-first": ("no_grad", "step", "no_grad"),
    "to-bfloat16": ("bfloat16", "step", "step", "observer_off", "step", "convert"),
    "to-bfloat16-later": ("step", "bfloat16", "step", "step", "observer_off", "step"),
    "to-float16-and-back": ("step", "float16", "step", "float32", "step"),
    "state-into-stepped": ("step", "step", "reload_into_stepped", "step", "observer_off", "step"),
    "grown-batch": ("step", "shape=8x35", "step", "shape=4x70", "step"),
    "input-dtype-changes": (
        "step",
        "input=bfloat16",
        "step",
        "input=float16",
        "step",
        "input=float32",
        "step",
    ),
    "clear-gradient-graph": ("step", "backward_twice"),
    "copies": ("step", "deepcopy", "step", "pickle", "step"),
    "repr": ("repr", "step", "repr", "observer_off", "repr", "fake_quant_off", "repr"),
    "export-mode": ("step", "export_on", "step", "no_grad", "export_off", "step"),
}


def sequence_cases() -> Iterator[Case]:
    """Sequences of switches, for each calculator and a few formats."""
    formats: tuple[dict[str, Any], ...] = (
        {"dtype": "int4", "qscheme": "asymmetric"},
        {"dtype": "uint8", "qformulation": "minval"},
        {"dtype": "float8_e4m3fn"},
        {"dtype": "float4_e2m1fn"},
    )
    granularities = (PER_TENSOR, per_channel(0), per_block(7, axis=1))
    for (name, script), calculator in product(SEQUENCES.items(), CALCULATORS):
        for seed, spec in enumerate(formats):
            yield Case(
                name=f"{name}-{calculator}-{spec['dtype']}",
                group=f"sequence-{name}",
                spec=spec
                | {"qparam_calculator_cls": calculator, "granularity": granularities[(seed + len(name)) % 3]},
                target="activation",
                shape=(4, 35),
                script=script,
                seed=seed,
            )
    for seed, (spec, calculator) in enumerate(product(formats, CALCULATORS)):
        yield Case(
            name=f"float64-{calculator}-{spec['dtype']}",
            group="sequence-float64",
            spec=spec | {"qparam_calculator_cls": calculator, "granularity": granularities[seed % 3]},
            target="activation",
            shape=(4, 35),
            input_dtype="float64",
            script=_script(calculator),
            seed=seed,
        )
    for seed, (constant, input_dtype) in enumerate(product((0.0, 0.1, 0.3, 0.999, 1.0), INPUT_DTYPES)):
        yield Case(
            name=f"averaging-{constant}-{input_dtype}",
            group="sequence-averaging-constant",
            spec={"dtype": "int8", "qscheme": "asymmetric", "qparam_calculator_cls": "moving_average"},
            target="activation",
            shape=(5, 27),
            input_dtype=input_dtype,
            script=("step",) * 5,
            seed=seed,
            averaging_constant=constant,
        )
