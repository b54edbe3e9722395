"""``search``: a compression for each layer within a budget."""

import argparse
from pathlib import Path
from typing import Any

from coreai_opt._cli.models import add_json, add_model, load, print_json
from coreai_opt._utils.writing import write_text

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("search", help="choose a compression for each layer within a budget")
    add_model(parser)
    add_json(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits-per-weight", type=float, metavar="BITS", help="average over the whole model")
    budget.add_argument("--size-bytes", type=int, metavar="BYTES", help="of the whole model")
    parser.add_argument("--metric", choices=("mse", "psnr", "kl"), default="mse", help="default: %(default)s")
    parser.add_argument(
        "--method", choices=("optimal", "greedy"), default="optimal", help="default: %(default)s"
    )
    parser.add_argument(
        "--layer", action="append", metavar="REGEX", help="search these layers; may be repeated"
    )
    parser.add_argument(
        *("--candidates-per-forward", "-k"),
        type=int,
        default=1,
        metavar="N",
        help="so many candidates of a layer share a forward, for models that run under torch.vmap",
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep measurements, and go on from them")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the front as SVG")
    parser.add_argument("--configs", type=Path, metavar="FOLDER", help="write the configurations as YAML")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Search with the default candidates on the example inputs."""
    from coreai_opt.search import search

    model, inputs = load(parsed.model)
    result = search(
        model,
        [inputs],
        bits_per_weight=parsed.bits_per_weight,
        size_bytes=parsed.size_bytes,
        metric=parsed.metric,
        method=parsed.method,
        layers=parsed.layer,
        candidates_per_forward=parsed.candidates_per_forward,
        state_path=None if parsed.state is None else str(parsed.state),
        progress=not parsed.json,
    )
    if parsed.csv is not None:
        result.to_csv(parsed.csv)
    if parsed.plot is not None:
        result.plot(parsed.plot)
    if parsed.configs is not None:
        parsed.configs.mkdir(parents=True, exist_ok=True)
        for kind, config in result.configs().items():
            write_text(parsed.configs / f"{kind}.yaml", config.to_yaml())
    if parsed.json:
        print_json(parsed, result.as_dict())
    else:
        print(result.table())
    return 0
