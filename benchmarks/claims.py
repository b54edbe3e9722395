"""The pages of docs/claims/, one a claim, from the results: ``python -m benchmarks.claims``.

Each page has the claim, the command, the machine, every case, with its spread if the results hold one,
and what speaks against it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import geometric_mean

__all__ = ["CLAIMS", "main", "page"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "claims"

Rows = Sequence[Mapping[str, Any]]
Table = tuple[Sequence[str], Iterable[Sequence[str]]]


@dataclass(frozen=True)
class Claim:
    """What is claimed, and where from.

    Attributes:
        title: the claim in words; ``{}`` takes the figure.
        results: name of the file of results.
        figure: the figure of the title, from the rows.
        table: head and rows of the page's table.
        peer: what it is compared with, and how that runs.
        against: what a sceptic should know.
        extremes: over how many cases the figure is, and how far they are apart.
    """

    title: str
    results: str
    figure: Callable[[Rows], str]
    table: Callable[[Rows], Table]
    peer: str
    against: str
    extremes: Callable[[Rows], str] = lambda rows: f"{len(rows)} cases."


def page(name: str) -> str:
    """The page of a claim, as Markdown."""
    claim = CLAIMS[name]
    data = json.loads((RESULTS / claim.results).read_text(encoding="utf-8"))
    rows, machine = data["results"], data["machine"]
    head, body = claim.table(rows)
    lines = [
        f"# {claim.title.format(claim.figure(rows))}",
        "",
        claim.extremes(rows),
        "",
        f"**Peer.** {claim.peer}",
        "",
        f"**Machine.** {machine['cpu']}, {machine['cores']} cores ({machine['isa']}), "
        f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}; "
        f"load {machine['load']} at the start; {machine['date'][:10]}.",
        "",
        "**Command.**",
        "",
        f"    {data['command']}",
        "",
        "| " + " | ".join(head) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
        *("| " + " | ".join(row) + " |" for row in body),
        "",
        f"**What speaks against it.** {claim.against}",
        "",
        f"All of the run is in `benchmarks/results/{claim.results}`; this page is made from it "
        f"(`python -m benchmarks.claims`).",
    ]
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _with_spread(row: Mapping[str, Any], contender: str) -> str:
    return f"{_time(row['seconds'][contender])} ± {row['spread'][contender]:.0%}"


def _case(row: Mapping[str, Any]) -> str:
    case = row["case"]
    parts = (case["format"], case["granularity"], case["dtype"], f"{case['size']}²", case["phase"])
    return ", ".join(filter(None, parts))


def _against(
    peer: str,
    chosen: Callable[[Mapping[str, Any]], bool],
    name: str,
    case: Callable[[Mapping[str, Any]], str] = _case,
) -> dict[str, Any]:
    """Figure and table of operators: ours and a peer's times, with spreads, and their ratio."""

    def of(rows: Rows) -> list[Mapping[str, Any]]:
        return [row for row in rows if peer in row["seconds"] and chosen(row)]

    def ratio(row: Mapping[str, Any]) -> float:
        return float(row["seconds"][peer] / row["seconds"]["native"])

    def figure(rows: Rows) -> str:
        ratios = [ratio(row) for row in of(rows)]
        return f"{geometric_mean(ratios):.1f} times as fast"

    def extremes(rows: Rows) -> str:
        ratios = [ratio(row) for row in of(rows)]
        return (
            f"Geometric mean of {len(ratios)} cases; the least {min(ratios):.1f}, the most {max(ratios):.1f}."
        )

    def table(rows: Rows) -> Table:
        head = ("case", "ours", name, "times as fast")
        return head, (
            (case(row), _with_spread(row, "native"), _with_spread(row, peer), f"{ratio(row):.1f}")
            for row in of(rows)
        )

    return {"figure": figure, "table": table, "extremes": extremes}


def _square(row: Mapping[str, Any]) -> str:
    """The case of a comparison with one peer's simulators."""
    return f"{row['case']}, {row['size']}²"


def _overhead_ratio(row: Mapping[str, Any]) -> float:
    return float(row["overhead"]["ours"] / row["overhead"]["apple"])


def _training_table(rows: Rows) -> Table:
    head = ("model, mode", "float step", "ours", "Apple's", "what int8 adds, ours ÷ Apple's", "same losses")
    return head, (
        (
            f"{row['model']}, {row['mode']}",
            _time(row["float_seconds"]["ours"]),
            _time(row["seconds"]["ours"]),
            _time(row["seconds"]["apple"]),
            f"{_overhead_ratio(row):.3f}",
            "yes" if row["same_losses"] else "no",
        )
        for row in rows
    )


def _graph_pairs(rows: Rows) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Of each model, the graph as it is and the graph under torch.compile."""
    by_mode = {(row["model"], row["mode"]): row for row in rows}
    return [
        (by_mode[model, "graph"], row) for (model, mode), row in by_mode.items() if mode == "compiled graph"
    ]


def _of_compiled(row: Mapping[str, Any], compiled: Mapping[str, Any]) -> float:
    return float(row["overhead"]["ours"] / compiled["overhead"]["apple"])


def _compiled_graphs_table(rows: Rows) -> Table:
    head = (
        *("model", "float step", "ours", "ours, compiled", "Apple's", "Apple's, compiled"),
        *("what int8 adds, ours ÷ Apple's compiled", "ours compiled ÷ Apple's compiled"),
    )
    return head, (
        (
            graph["model"],
            _time(graph["float_seconds"]["ours"]),
            *(_time(row["seconds"]["ours"]) for row in (graph, compiled)),
            *(_time(row["seconds"]["apple"]) for row in (graph, compiled)),
            f"{_of_compiled(graph, compiled):.3f}",
            f"{_of_compiled(compiled, compiled):.3f}",
        )
        for graph, compiled in _graph_pairs(rows)
    )


def _palette_table(rows: Rows) -> Table:
    head = ("case", "ours", "Apple's", "times as fast", "error, ours ÷ Apple's")
    return head, (
        (
            f"{row['dtype']}, {row['granularity']}, {row['n_bits']} bits, {row['size']}²",
            _time(row["ours"]["seconds"]),
            _time(row["apple"]["seconds"]),
            f"{row['ratio']:.1f}",
            f"{row['error_ratio']:.7f}",
        )
        for row in rows
    )


def _is_simulator(row: Mapping[str, Any]) -> bool:
    case = row["case"]
    return case["op"] == "simulator" and case["format"] in ("int4", "int8") and 256 <= case["size"] <= 2048


_TURNS = "The contenders take turns, and medians count; ± is the distance between quartiles."

_TORCHAO = (
    "`IntxFakeQuantizer` of torchao 0.18.0, forward and backward, beside the same object after "
    "`coreai_accelerate.torchao`"
)
_AGAINST_TORCHAO = (
    "Simulators alone, on one thread, in float32: other dtypes are left to torchao's methods. At 64² most of "
    "a call is Python. A step of a model is mostly matrix products."
)

CLAIMS = {
    "training-steps": Claim(
        title="What int8 adds to a training step is {} of what Apple's package adds",
        results="training-epyc-1core.json",
        figure=lambda rows: f"{geometric_mean([_overhead_ratio(row) for row in rows]):.2f}",
        table=_training_table,
        peer="Apple's coreai-opt 0.4.0, in a process of its own, eager and graph mode; the same "
        "float model, data and "
        "seeds, in turns.",
        against="Eight small models on one core; a step of a large model is mostly matrix products, "
        "of which both have as "
        "many. The overhead is a difference of two medians, which for the small models is near the "
        "noise. Convolutions in "
        "graph mode gain least: the arithmetic around their batch norms is the same in both packages.",
    ),
    "compiled-graphs": Claim(
        title="What int8 adds in graph mode is {} of what Apple's graph adds under torch.compile",
        results="compiled-avx2-2cores.json",
        figure=lambda rows: f"{geometric_mean([_of_compiled(*pair) for pair in _graph_pairs(rows)]):.2f}",
        table=_compiled_graphs_table,
        peer="Apple's coreai-opt 0.4.0, in a process of its own: the graph that it prepares, under "
        "torch.compile; the same float model, data and seeds, in turns.",
        against="Three small models on one thread. Other jobs ran on both cores: times are the processor's, "
        "and longer than on an idle machine. The MLP's float model is slower under torch.compile, too (9.4 "
        "against 7.7 ms in another run): inductor draws the random numbers of dropout one by one on a CPU.",
        extremes=lambda rows: f"Geometric mean of {len(_graph_pairs(rows))} models.",
    ),
    "simulators": Claim(
        title="A simulator of int4 or int8 is {} as Apple's",
        results="cpu-epyc-1core.json",
        peer=f"The same simulator of Apple's coreai-opt 0.4.0, eager, observer on. {_TURNS}",
        against="Another job ran on the other core. 64² is left out here: it measures Python's "
        "calls, not the kernel.",
        **_against("apple", _is_simulator, "Apple's"),
    ),
    "fused-observers": Claim(
        title="A fake quantizer with a moving average is {} as ATen's fused one",
        results="cpu-xeon-2cores.json",
        peer=f"`torch.fused_moving_avg_obs_fake_quant`, torch's own C++ operator, forward alone. {_TURNS}",
        against="int8 in fp32, per tensor and per channel, is what ATen's operator takes. At 4096² "
        "most of the time is fresh memory.",
        **_against("torch", lambda row: row["case"]["op"] == "observe_and_fake_quantize", "ATen's"),
    ),
    "compiled": Claim(
        title="Kernels are {} as the same arithmetic under torch.compile",
        results="cpu-xeon-2cores.json",
        peer=f"The reference, plain torch operations, compiled by inductor. {_TURNS}",
        against="Three cases, on a CPU.",
        **_against("compile", lambda row: True, "inductor's"),
    ),
    "nncf": Claim(
        title="Learned ranges and random masks are {} as NNCF's",
        results="controllers-xeon-2cores.json",
        peer="NNCF 2.13's torch fallback: its C++ extension is not built (`benchmarks/nncf.py` says "
        "how to set it up). "
        f"{_TURNS}",
        against="NNCF's extension, which needs a compiler at run time, was not measured.",
        **_against("nncf", lambda row: True, "NNCF's"),
    ),
    "modelopt": Claim(
        title="Fake quantization of weights is {} as ModelOpt's on a CPU",
        results="modelopt-avx2-2cores.json",
        peer="`TensorQuantizer` of ModelOpt 0.47.0 on a CPU, its range known (`benchmarks/modelopt.py` says "
        f"how to set it up), beside `coreai_kernels.fake_quantize`; forward and backward. {_TURNS}",
        against="ModelOpt is written for GPUs, where its kernels are its own; on a CPU it runs torch's "
        "operators. Other jobs ran on both cores: times are the processor's, and longer than on an idle "
        "machine.",
        **_against("modelopt", lambda row: True, "ModelOpt's", _square),
    ),
    "torchao": Claim(
        title="A simulator of torchao's training is {} on this engine as eager",
        results="torchao-xeon-2cores.json",
        peer=f"{_TORCHAO}, as it is: torch's operators one by one. {_TURNS}",
        against=_AGAINST_TORCHAO,
        **_against("torchao", lambda row: True, "torchao's", _square),
    ),
    "torchao-compiled": Claim(
        title="A simulator of torchao's training is {} on this engine as under torch.compile",
        results="torchao-xeon-2cores.json",
        peer=f"{_TORCHAO}, each simulator under `torch.compile(fullgraph=True)`. {_TURNS}",
        against=f"{_AGAINST_TORCHAO} In a model that is compiled as a whole, inductor fuses a simulator with "
        "what is around it, and a call costs no Python: that was not measured.",
        **_against("torchao, compiled", lambda row: True, "torchao's, compiled", _square),
    ),
    "pt2e": Claim(
        title="A fake quantizer of PT2E's is {} on this engine",
        results="pt2e-avx2-2cores.json",
        peer="`FusedMovingAvgObsFakeQuantize` of torchao 0.18.0, one C++ operator of torch's, forward and "
        f"backward, beside the same object after `coreai_accelerate.torchao`. {_TURNS}",
        against="int8 on one thread, in float32. Below 32,768 elements, so at 64², torch's operator runs, "
        "behind some Python. Other jobs ran on both cores: times are the processor's, and longer than on an "
        "idle machine.",
        **_against("torchao", lambda row: True, "torchao's", _square),
    ),
    "palettes": Claim(
        title="4-bit palettes of a 4096² weight are found {}",
        results="clustering-xeon-2cores.json",
        figure=lambda rows: (
            f"{min(row['ratio'] for row in rows):.0f} to {max(row['ratio'] for row in rows):.0f} "
            f"times as fast as by Apple's"
        ),
        table=_palette_table,
        peer="`KMeansPalettizer.prepare` of Apple's coreai-opt 0.3.0 on the same weight, two threads.",
        against="One size, and the version of Apple's package before the current one.",
    ),
}


def main() -> None:
    """Write all pages."""
    PAGES.mkdir(exist_ok=True)
    for name in CLAIMS:
        (PAGES / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
