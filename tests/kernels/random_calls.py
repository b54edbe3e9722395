"""Random calls of operators against the reference, many of them: ``python -m tests.kernels.random_calls``.

The tests of ``test_backends_agree.py`` with cases drawn by a seed: without hypothesis, which takes longer to
choose a case than the operators do. A failure prints the seed; ``--start SEED --examples 1`` repeats it.
Triton's kernels without a GPU: ``TRITON_INTERPRET=1 python -m tests.kernels.random_calls --backend triton``.
The interpreter runs a launch's programs one after another: all but one of fifty cases have few blocks then.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from tqdm import tqdm

from coreai_kernels import RangeUpdate, ScaleFormat, Scheme, native, use_backend
from tests.kernels import test_backends_agree as tests
from tests.kernels.faster_interpreter import faster_interpreter
from tests.kernels.support import Case, cases

__all__ = ["main"]


class Draw:
    """What a function of hypothesis draws with, of the strategies that the cases are made of."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)

    def __call__(self, strategy: Any) -> Any:
        strategy = getattr(strategy, "wrapped_strategy", strategy)
        kind = type(strategy).__name__
        if hasattr(strategy, "elements"):
            return self.choose.choice(list(strategy.elements))
        if kind == "IntegersStrategy":
            return self.choose.randint(strategy.start, strategy.end)
        if kind == "BooleansStrategy":
            return self.choose.random() < 0.5
        if kind == "CompositeStrategy":
            return strategy.definition(self, *strategy.args, **strategy.kwargs)
        if kind == "OneOfStrategy":
            return self(self.choose.choice(strategy.original_strategies))
        raise TypeError(f"{kind}: cases are made of something new; draw it here, too")

    draw = __call__


Test = Callable[..., None]
_ONE, _FORMULATION = (cases(),), (cases(), tests.formulations)
_FIXED = st.sampled_from([(None, None), (-0.7, None), (None, 1.3), (-2.0, 0.3)])
_INTERPRETED_BLOCKS = 8
# Test, what it takes, and how many operators of the backend under test it calls.
TESTS: list[tuple[Any, tuple[Any, ...], int]] = [
    (tests.test_fake_quantize, _FORMULATION, 3),
    (tests.test_observe_range, _ONE, 1),
    (tests.test_choose_qparams, (*_ONE, *map(st.sampled_from, (list(Scheme), list(ScaleFormat)))), 1),
    (
        tests.test_observe_and_fake_quantize,
        (
            *(*_ONE, st.sampled_from(list(Scheme)), st.sampled_from(list(RangeUpdate)), st.booleans()),
            *(st.sampled_from(list(ScaleFormat)), _FIXED),
        ),
        6,
    ),
    (tests.test_quantize_and_dequantize, _FORMULATION, 2),
    (tests.test_bits, (st.integers(1, 8), st.integers(0, 300), st.booleans(), st.integers(0, 99)), 2),
]


def with_blocks(case: Case, most: int) -> Case:
    """The case with at most so many blocks: the largest side of its grid is halved until they are so few."""
    grid = list(case.grid)
    while math.prod(grid) > most:
        largest = grid.index(max(grid))
        grid[largest] = (grid[largest] + 1) // 2
    shape = tuple(side * block for side, block in zip(grid, case.block_size, strict=True))
    return dataclasses.replace(case, shape=shape)


def run(seed: int, blocks: int | None = None) -> int:
    """One example of each test; the number of calls.

    With ``blocks``, all but one of fifty cases have at most so many.
    """
    count = 0
    for number, (test, strategies, calls) in enumerate(TESTS):
        draw = Draw(seed * len(TESTS) + number)
        arguments = [draw(each) for each in strategies]
        if blocks is not None and draw.choose.random() < 0.98:
            arguments = [with_blocks(each, blocks) if isinstance(each, Case) else each for each in arguments]
        if test is tests.test_quantize_and_dequantize:
            arguments.append(draw)
        test.hypothesis.inner_test(*arguments)
        count += calls
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.random_calls", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000, help="at least so many of operators")
    parser.add_argument("--start", type=int, default=0, help="seed of the first example")
    parser.add_argument("--isa", help="instruction set, e.g. generic; by default the best")
    parser.add_argument("--backend", choices=("auto", "triton"), default="auto", help="the one under test")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the processor, at most")
    parser.add_argument("--examples", type=int, help="so many instead of --calls")
    arguments = parser.parse_args(argv)
    if arguments.backend == "auto" and native.extension is None:
        raise SystemExit(f"the native backend is not loaded: {native.missing}")
    if arguments.isa:
        native.extension.set_cpu_capability(arguments.isa)
    tests.TESTED = arguments.backend
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN under Triton's interpreter
    interpreted = arguments.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    blocks = _INTERPRETED_BLOCKS if interpreted else None
    start, count, seed = time.process_time(), 0, arguments.start
    last = None if arguments.examples is None else arguments.start + arguments.examples
    bar = tqdm(total=arguments.calls, unit="call", mininterval=1)
    faster = faster_interpreter() if interpreted else contextlib.nullcontext()
    with bar, faster, use_backend(arguments.backend):
        while count < arguments.calls if last is None else seed < last:
            if time.process_time() - start > arguments.seconds:
                break
            try:
                done = run(seed, blocks)
            except Exception as error:
                error.add_note(f"--start {seed} --examples 1")
                raise
            count, seed = count + done, seed + 1
            bar.update(done)
    isa = native.extension.cpu_capability() if arguments.backend == "auto" else arguments.backend
    seconds = time.process_time() - start
    seeds = f"seeds {arguments.start} to {seed - 1}"
    print(f"{isa}: {count:,} calls, {seeds}, gave the reference's bits in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
