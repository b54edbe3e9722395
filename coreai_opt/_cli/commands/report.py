"""``report``: a page about a compressed model."""

import argparse
from pathlib import Path
from typing import Any

from coreai_opt._cli.models import add_configurations, add_json, add_model, compressed, print_json

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("report", help="write an HTML page about a compressed model")
    add_model(parser)
    parser.add_argument("path", type=Path, metavar="FILE", help="the page to write")
    add_configurations(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Prepare the model, and write the page."""
    from coreai_opt.inspection import report

    model, inputs = compressed(parsed)
    found = report(model, parsed.path, inputs)
    if parsed.json:
        print_json(parsed, found)
    else:
        print(f"{parsed.path}: {found['model']['bits_per_weight']:.3f} bits per weight")
    return 0
