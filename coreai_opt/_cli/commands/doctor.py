"""``doctor``: what is installed, what runs, and what to do about the rest."""

import argparse
import dataclasses
from typing import Any

from coreai_opt._cli.models import add_json, print_json

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("doctor", help="look at the installation; status 1 if it is broken")
    add_json(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the table or the findings; 1 if something that must work does not."""
    from coreai_opt import doctor

    if not parsed.json:
        return doctor.main()
    diagnosis = doctor.examine()
    findings = [dataclasses.asdict(finding) for finding in diagnosis.findings]
    print_json(parsed, {"broken": diagnosis.broken, "findings": findings})
    return int(diagnosis.broken)
