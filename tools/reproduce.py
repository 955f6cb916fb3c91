"""Train and evaluate the rows of a paper's table or figure, and show them beside what the paper prints.

A row is a recipe under ltdr/, mocle/ or qmoe/ (`moe-lvlm recipes` lists them). Each different recipe and seed is one run in a
folder of its own, shared by all tables; dense stages are trained once a seed, and every row begins with them. What is
done is not done again, and what was broken off goes on: the same command always takes up where it stopped.

papers: ltdr  table1, table3, table4, table5, table6, table7, table11, table12, figure1b, figure4, figure5, claims
        mocle table2, table3, table4, table5, table6, table7, figure3_clusters, figure3_experts, figure3_temperature,
              conflict, conflict_gating
        qmoe  table1, table2, table3, table4, table5, table6, figure3, claims
        A table is <paper>.<table>: qmoe.table4, or qmoe.4 for short; ltdr.figure1b, or ltdr.1b; qmoe.all is all of a
        paper's. Without a paper LTDR's are meant: 3 is ltdr.table3. --list tells what each is.
scales: tiny  a small model on emoji scenes, minutes a run on one CPU core: it shows the direction of an effect at best
        full  the paper's models and data, which have to be there (see docs/recipes.md)

Examples:
    python tools/reproduce.py ltdr.table3 --seeds 5
    python tools/reproduce.py mocle.table7 --seeds 5
    python tools/reproduce.py qmoe.4 --seeds 3 --rows pre,cls --json table4.json
    python tools/reproduce.py qmoe.claims --seeds 5 --markdown claims.md
    python tools/reproduce.py qmoe.all --dry-run

The tables go to stdout, progress to stderr, runs to --out, figures to <out>/figures, what runs say to <out>/logs.

Exit status: 0, all is there; 1, a run failed (it is named, with the end of its log); 2, a mistake in the options or
recipes; 130, interrupted: the runs have saved.
"""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from types import FrameType

import terminal


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = terminal.make_parser(__doc__)
    parser.add_argument("table", metavar="TABLE", nargs="?", help="which table or figure of which paper")
    parser.add_argument("--list", action="store_true", help="list papers, tables and rows, and do nothing")
    parser.add_argument("--scale", choices=("tiny", "full"), default="tiny", help="default: tiny")
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    parser.add_argument("--rows", type=_names, metavar="A,B", help="only these rows, by recipe, and their baseline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, seed by seed")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), help="folder of the runs (default: runs/reproduce)"
    )
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs at a time (default: what the machine holds)")
    parser.add_argument(
        "--processes", type=_positive, metavar="N", help="of one run (default: 1, at full scale one a GPU)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the runs, their state and their commands only")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of every run, such as stages.2.steps=60; may be given several times; give another --out too",
    )  # fmt: skip
    parser.add_argument(
        "--recipes", metavar="PREFIX", help="of the rows' recipes (default: the paper's), or a folder with <row>.yaml"
    )
    args = parser.parse_args(argv)
    if args.table is None and not args.list:
        parser.error("TABLE is missing; --list tells which there are")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}; allowed: a whole number above 0")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    """Row names, with or without the prefix that the recipes have."""
    return tuple(name.rpartition("/")[2] for name in text.split(",") if name)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # so that runs are asked to save also when a batch system ends this program
    signal.signal(signal.SIGTERM, _interrupt)
    return terminal.run(lambda: _list() if args.list else reproduce(args))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _list() -> int:
    from reproducing.paper import read_papers

    for paper in read_papers().values():
        print(f"{paper.name}: {paper.title}")
        for table in paper.tables.values():
            print(f"  {f'{paper.name}.{table.name}':28}{table.title}")
            for row in table.rows:
                print(f"{'':30}  {row.recipe:26}{row.label}")
    return terminal.DONE


def reproduce(args: Namespace) -> int:
    """Do what the options say; the exit status."""
    from reproducing.paper import choose, keep_rows, read_papers

    paper, tables = choose(args.table, read_papers())
    if args.rows is not None:
        if len(tables) > 1:
            raise ValueError(f"--rows: rows of one table, but TABLE is {args.table}")
        tables = (keep_rows(tables[0], args.rows),)

    # after the options: these import torch, for seconds
    from reproducing.jobs import Launcher
    from reproducing.machine import choose_machine
    from reproducing.plan import Options, make_plan
    from reproducing.session import Session, write_json, write_markdown

    machine = choose_machine(jobs=args.jobs, processes=args.processes, scale=args.scale)
    options = Options(
        scale=args.scale,
        out=args.out,
        processes=machine.processes,
        recipes=args.recipes or paper.recipes,
        overrides=tuple(args.override),
    )
    plan = make_plan([row.recipe for table in tables for row in table.rows], args.seeds, options)
    session = Session(
        paper=paper,
        tables=tables,
        plan=plan,
        out=args.out,
        scale=args.scale,
        seeds=args.seeds,
        machine=machine,
        launcher=Launcher(machine.gpus_by_job),
    )
    session.check()
    if args.dry_run:
        print(session.describe())
        return terminal.DONE
    try:
        outcome = session.make_runs()
    except KeyboardInterrupt:
        print(f"interrupted; the runs in {args.out} have saved, and the same command goes on", file=sys.stderr)
        return terminal.INTERRUPTED

    grids, data = session.report()
    data |= {"failed": outcome.problems, "stopped": outcome.stopped}
    print("\n\n".join(grid.text() for grid in grids))
    for name, table in data["tables"].items():
        if "figure" in table:
            print(f"{paper.name}.{name}: {table['figure'] or 'no run that has what it shows'}")
    if args.json is not None:
        write_json(args.json, data)
    if args.markdown is not None:
        write_markdown(args.markdown, grids)
    for problem in (*outcome.problems, *(f"{name}: stopped" for name in outcome.stopped)):
        print(f"\n{problem}", file=sys.stderr)
    return terminal.FAILED if outcome.problems or outcome.stopped else terminal.DONE


if __name__ == "__main__":
    sys.exit(main())
