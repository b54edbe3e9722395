"""``inspect``: the operations of a model, as compressors see them."""

import argparse
from typing import Any

from coreai_opt._cli.models import add_json, add_model, load, print_json

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("inspect", help="list the operations of a model")
    add_model(parser)
    add_json(parser)
    parser.add_argument("--mode", choices=("eager", "graph"), default="eager", help="default: %(default)s")
    parser.add_argument(
        "--compressor",
        choices=("quantizer", "palettizer"),
        help="list only what this compressor knows",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the tree, or the operations as JSON."""
    from coreai_opt.inspection import ModelInspector
    from coreai_opt.palettization import KMeansPalettizer
    from coreai_opt.quantization import Quantizer

    compressors = {None: None, "quantizer": Quantizer, "palettizer": KMeansPalettizer}
    model, inputs = load(parsed.model)
    inspector = ModelInspector(model, inputs, parsed.mode, compressors[parsed.compressor])  # type: ignore[arg-type]
    if not parsed.json:
        print(inspector.format_summary())
        return 0
    modules = [
        {
            "module": name,
            "type": module.module_type,
            "ops": [
                {
                    "name": op.op_name,
                    "type": op.op_type,
                    "inputs": [edge.op_name for edge in op.inputs if not edge.is_state],
                    "states": [edge.op_name for edge in op.inputs if edge.is_state],
                    "outputs": {slot: [user.op_name for user in users] for slot, users in op.outputs.items()},
                }
                for op in module.ops
            ],
        }
        for name, module in inspector.summary.model.named_modules()
    ]
    print_json(parsed, {"mode": str(inspector.summary.mode), "modules": modules})
    return 0
