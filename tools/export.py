"""Write a trained model as a folder that other programs load.

model: one Hugging Face folder with the weights in shards, configuration, processor, tokenizer, chat template, a model
card and checksums. A run gives its newest valid checkpoint; one checkpoint or a model folder of ours can be named too.

Two forms. `stock` loads with plain transformers (LLaVA around Mixtral, Qwen2Moe or Qwen3Moe), without this package and
without remote code: where routing is ordinary top-k and a stock class computes what the language model's family does.
`native` brings our modelling code along (trust_remote_code=True; it needs pydantic): everything else. `auto` takes stock
where it can, and says why where it cannot.

LTDR gives vision tail tokens more experts (EEA); no stock class can. --without-eea switches that off, and what it changes
is measured first on samples of the run (or of --records), printed, and written to the card and to eea_report.json.

mocle: adapters of a run as PEFT adapters, one a distinct row of the gates (clusters, or datasets), each of which computes
what the trained model computes for that row; the trained connector; the centres of the clusters; an index of which
adapter is whose. They are put on a stock LLaVA or InstructBLIP: the one that the run began with, or --with-base writes
it. Where no stock class has the whole model, on its language model alone. A single LoRA gives one adapter. --merge gives a
stock model with one of them in its weights instead.

What was written is read back and compared with the trained model on synthetic inputs (--check, --no-check; by default
where the model fits into half of the free memory).

Example:
  python tools/export.py model runs/quickstart out/quickstart
  python tools/export.py mocle runs/llava_mocle out/adapters --with-base --dtype bfloat16
  python tools/export.py mocle runs/llava_mocle out/cluster-2 --merge 2
  python tools/export.py model runs/quickstart out/stock --format stock --without-eea --dtype bfloat16
  python tools/export.py model runs/big/checkpoints/sparse-005000 out/big --max-shard-size 2GB --dry-run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from terminal import DONE, byte_progress, make_parser, parse_bytes, run

if TYPE_CHECKING:  # what needs torch is imported by the command, so that --help is quick
    from moe_lvlm.conversion.adapter_export import AdapterExport
    from moe_lvlm.conversion.adapter_plan import AdapterPlan
    from moe_lvlm.conversion.export import ExportPlan, ExportResult


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model = commands.add_parser("model", help="one Hugging Face folder", allow_abbrev=False)
    _add_shared(model)
    model.add_argument(
        "--format", choices=("auto", "stock", "native"), default="auto", help="see above (default: auto)"
    )
    model.add_argument("--without-eea", action="store_true", help="switch off the extra experts of vision tail tokens")
    model.add_argument("--eea-samples", type=_count, default=32, metavar="N",
                       help="samples to measure what EEA changes; 0 measures nothing (default: 32)")  # fmt: skip
    model.add_argument("--records", type=Path, metavar="FILE", help="measure on records of this file (LLaVA layout)")
    model.add_argument("--image-root", type=Path, metavar="DIR", help="where the records' images lie (default: beside)")
    model.add_argument("--device", help="where EEA is measured (default: a GPU if there is one)")
    model.set_defaults(export=export)
    mocle = commands.add_parser("mocle", help="PEFT adapters, one a distinct row of the gates", allow_abbrev=False)
    _add_shared(mocle)
    mocle.add_argument(
        "--format",
        choices=("auto", "vlm", "language_model"),
        default="auto",
        help="what they are put on (default: auto)",
    )
    mocle.add_argument("--with-base", action="store_true", help="write the base too, with the trained connector in it")
    mocle.add_argument("--base", metavar="NAME",
                       help="the base's name in the files (default: what the run began with); for a model folder its "
                       "folder, to see what was trained")  # fmt: skip
    mocle.add_argument("--clusters", type=Path, metavar="FILE", help="the table of clusters (default: the recipe's)")
    mocle.add_argument("--merge", metavar="ROW",
                       help="a stock model with the adapter of this cluster (its number) or dataset (its name) in its "
                       "weights; of a single LoRA: lora")  # fmt: skip
    mocle.set_defaults(export=export_mocle)
    return parser.parse_args(arguments)


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", metavar="RUN", help="a run's folder, one of its checkpoints, or a model folder of ours"
    )
    command.add_argument("target", metavar="DIR", type=Path, help="the folder to write")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as wide as the weights are"
    )
    command.add_argument("--max-shard-size", type=parse_bytes, metavar="SIZE",
                         help="most bytes of a weights file (default: 5GB)")  # fmt: skip
    command.add_argument(
        "--license", default="unknown", metavar="ID", help="licence, as the Hub names it, for the card"
    )
    command.add_argument(
        "--check", action=argparse.BooleanOptionalAction, help="compare with the trained model, or not"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a folder that this program wrote")
    command.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, 0 or above")
    return int(text)


def export(options: argparse.Namespace) -> int:
    """The command `model`."""
    from moe_lvlm.checkpoint.model_folder import DEFAULT_SHARD_BYTES, as_dtype, check_target
    from moe_lvlm.conversion.export import check_refusal, export_model, plan_export
    from moe_lvlm.evaluation.eea import measure_eea

    check_target(options.target, is_overwriting=options.overwrite)
    dtype = None if options.dtype is None else as_dtype(options.dtype)
    plan = plan_export(options.source, format=options.format, dtype=dtype, is_eea_off=options.without_eea)
    max_shard_bytes = options.max_shard_size or DEFAULT_SHARD_BYTES
    print_plan(plan, max_shard_bytes)
    if options.dry_run:
        refusal = check_refusal(plan) if options.check is None else None
        print(f"a check would be left out: {refusal}" if refusal else "dry run: nothing was written")
        return DONE
    report = None
    if plan.has_eea and options.eea_samples:
        report = measure_eea(
            plan.source, num_samples=options.eea_samples, records=options.records, image_root=options.image_root,
            device=options.device,
        )  # fmt: skip
        print_eea(report)
    with byte_progress("weights", plan.num_bytes) as advance:
        result = export_model(
            plan, options.target,
            max_shard_bytes=max_shard_bytes, license=options.license, eea_report=report,
            is_checked=options.check, is_overwriting=options.overwrite, advance=advance,
        )  # fmt: skip
    print_result(result)
    return DONE


def export_mocle(options: argparse.Namespace) -> int:
    """The command `mocle`."""
    from moe_lvlm.checkpoint.model_folder import DEFAULT_SHARD_BYTES, as_dtype, check_target
    from moe_lvlm.conversion.adapter_export import check_refusal, export_adapters
    from moe_lvlm.conversion.adapter_plan import plan_adapters

    check_target(options.target, is_overwriting=options.overwrite)
    plan = plan_adapters(
        options.source,
        form=options.format,
        has_base=options.with_base,
        base=options.base,
        clusters=options.clusters,
        merge=options.merge,
        dtype=None if options.dtype is None else as_dtype(options.dtype),
    )
    print_adapters(plan)
    if options.dry_run:
        refusal = check_refusal(plan) if options.check is None else None
        print(f"a check would be left out: {refusal}" if refusal else "dry run: nothing was written")
        return DONE
    with byte_progress("weights", plan.num_bytes) as advance:
        result = export_adapters(
            plan, options.target,
            max_shard_bytes=options.max_shard_size or DEFAULT_SHARD_BYTES, license=options.license,
            is_checked=options.check, is_overwriting=options.overwrite, advance=advance,
        )  # fmt: skip
    print_exported(result)
    return DONE


def print_adapters(plan: AdapterPlan) -> None:
    """How many adapters, on what, how large."""
    for note in plan.notes:
        print(f"note: {note}")
    dtype = str(plan.dtype).removeprefix("torch.")
    print(f"source: {plan.source}")
    if plan.merged is not None:
        print(f"one {plan.base.architecture} with {plan.merged.name} merged; {decimal(plan.num_bytes)} as {dtype}")
        return
    base = "written too" if plan.has_base else (plan.base_name or "not known")
    print(f"base: {plan.base.architecture} ({base}); trained connector: {_connector(plan)}")
    rows = sum(len(one.rows) for one in plan.adapters)
    of = f" for {rows} rows of the gates" if rows else ""
    print(
        f"adapters: {len(plan.adapters)}{of}, of rank {plan.read.rank} on {len(plan.read.linears)} linear layers; "
        f"{decimal(plan.num_bytes)} as {dtype}"
    )


def _connector(plan: AdapterPlan) -> str:
    if plan.connector is not None:
        return "a file of its own"
    return "in the base" if plan.has_base else "none"


def print_exported(result: AdapterExport) -> None:
    """Where it is, and whether it was compared."""
    written = result.written
    print(f"written: {written.path} ({decimal(written.bytes)} in {written.seconds:.1f} s)")
    if result.check is None:
        print(f"not compared with the trained model: {result.not_checked}")
        return
    found = result.check
    of = f", {found.rows} rows of the gates" if found.rows > 1 else ""
    print(
        f"compared with the trained model{of}: logits differ by at most {found.max_difference:.2g} (largest logit "
        f"{found.largest_logit:.3g})"
    )


def print_plan(plan: ExportPlan, max_shard_bytes: int) -> None:
    """Form, class, size."""
    from moe_lvlm.checkpoint.model_folder import plan_shards

    if plan.form == "stock":
        print(f"form: stock; plain transformers loads it as {plan.architecture} around {plan.language_model}")
    else:
        assert plan.code is not None
        needs = ", ".join(plan.code.packages)
        print(f"form: native; loads with trust_remote_code=True as {plan.architecture} (needs {needs})")
    if plan.reason:
        print(f"not stock: {plan.reason}")
    for caveat in plan.caveats:
        print(f"note: {caveat}")
    shards = len(plan_shards(plan.tensors, max_shard_bytes=max_shard_bytes).names_of)
    counts = plan.parameters
    print(f"source: {plan.source}")
    print(
        f"parameters: {counts.total:,}, activated a token {counts.activated:,}; "
        f"{decimal(plan.num_bytes)} as {str(plan.dtype).removeprefix('torch.')} in {shards} file(s)"
    )


def print_eea(report: dict[str, Any]) -> None:
    """The report on EEA as a small table."""
    if report["samples"] is None:
        print(f"what EEA changes could not be measured: {report['reason']}")
        return
    logits, rows, answers = report["logits"], report["rows_per_token"], report["answers"]
    table = Table(f"EEA, {report['samples']} samples of {report['source']}", "with", "without")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("rows a token", f"{rows['with_eea']:.3f}", f"{rows['without_eea']:.3f}")
    if (score := answers["exact_match"]) is not None:
        table.add_row("exact match", f"{score['with_eea']:.3f}", f"{score['without_eea']:.3f}")
    shares = (f"{layer}: {share:.1%}" for layer, share in report["tail_share"].items() if share is not None)
    table.add_row(f"vision tokens in the tail, by layer: {', '.join(shares) or 'no image'}")
    table.add_row(f"logits: mean difference {logits['mean_abs']:.3g}, largest {logits['max_abs']:.3g}")
    table.add_row(f"KL divergence: mean {logits['mean_kl']:.3g}, largest {logits['max_kl']:.3g}")
    table.add_row(f"same greedy token at {logits['greedy_agreement']:.1%} of {logits['positions']} answer positions")
    table.add_row(f"answers that differ: {answers['different']} of {answers['generated']}")
    Console().print(table)


def print_result(result: ExportResult) -> None:
    """Where it is, and whether it was compared."""
    from moe_lvlm.conversion.export import EEA_REPORT

    written = result.written
    print(f"written: {written.path} ({decimal(written.bytes)} in {written.seconds:.1f} s)")
    if (written.path / EEA_REPORT).is_file():
        print(f"what EEA changes: {written.path / EEA_REPORT}")
    if result.check is None:
        print(f"not compared with the trained model: {result.not_checked}")
        return
    found = result.check
    print(
        f"compared with the trained model: logits differ by at most {found.max_difference:.2g} (largest logit "
        f"{found.largest_logit:.3g}) at {found.positions} positions, {found.tokens_generated} generated tokens are equal"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    options = parse_arguments(arguments)
    return run(lambda: options.export(options))


if __name__ == "__main__":
    sys.exit(main())
