"""The command line: what the package does with a model that a function of yours builds."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

from coreai_opt._cli.commands import doctor, export, inspect, report, search
from coreai_opt._cli.models import UsageError

__all__ = ["main"]

_EXPLANATION = """
MODEL is module:function. The function takes no arguments and returns the model and its example inputs:

    def build():
        return Net().eval(), (torch.randn(1, 3, 224, 224),)

Exit status: 0 for success, 1 for a failure, 2 for wrong arguments.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those after the program's name; None for those that it was started with.

    Returns:
        0, 1 for a failure, 2 for wrong arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m coreai_opt",
        description="Inspect, search, export and report compressed PyTorch models.",
        epilog=_EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (inspect, search, export, report, doctor):
        command.add_to(commands)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as ended:
        # argparse ends the process for --help and for wrong arguments, after it has said why.
        return int(ended.code or 0)
    parsed.output = sys.stdout
    with warnings.catch_warnings(), redirect_stdout(sys.stderr if parsed.json else sys.stdout):
        # What models and converters print is no JSON.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return int(parsed.run(parsed))
        except UsageError as error:
            print(f"{parser.prog} {parsed.command}: {error}", file=sys.stderr)
            return 2
        except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError, ImportError) as error:
            print(f"{parser.prog} {parsed.command}: {type(error).__name__}: {error}", file=sys.stderr)
            for note in getattr(error, "__notes__", ()):
                print(note, file=sys.stderr)
            return 1
