"""``export``: from a model to a file that is checked."""

import argparse
from pathlib import Path
from typing import Any

from coreai_opt._cli.models import UsageError, add_configurations, add_json, add_model, compressed, print_json

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("export", help="write a compressed model to a file")
    add_model(parser)
    parser.add_argument("path", type=Path, metavar="FILE", help=".aimodel, .mlpackage, .onnx or .pt2")
    add_configurations(parser)
    add_json(parser)
    parser.add_argument("--half", action="store_true", help="store and compute in float16")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Prepare the model, finalize it for the file's kind, write and check it."""
    from coreai_opt.export import save

    model, inputs = compressed(parsed)
    if not isinstance(inputs, tuple):
        raise UsageError(
            f"MODEL: export needs the example inputs as a tuple of positional arguments; "
            f"{parsed.model} returns a {type(inputs).__name__}"
        )
    saved = save(model, parsed.path, inputs, half=parsed.half, progress=not parsed.json)
    if parsed.json:
        print_json(
            parsed,
            {
                "path": str(saved.path),
                "size": saved.size,
                "difference": saved.difference,
                "checked": saved.checked,
            },
        )
    else:
        print(saved)
    return 0
