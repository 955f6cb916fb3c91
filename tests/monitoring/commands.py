"""`status` and `logs` on a command line of their own: `python -m tests.monitoring.commands logs RUN`."""

from __future__ import annotations

import argparse
import sys

from moe_lvlm.monitoring.command import add_logs, add_status


def run_command(*argv: str) -> None:
    """Parse and run; a user's mistake is raised, but for those of the parser."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    add_status(commands)
    add_logs(commands)
    arguments = parser.parse_args(argv)
    arguments.handler(arguments)


if __name__ == "__main__":
    run_command(*sys.argv[1:])
    assert "torch" not in sys.modules
