"""Convert models between layouts; nothing is read before it is written, so memory stays near the largest tensor.

The result is a folder with weights, configuration and processor: `moe_lvlm.load(folder)` reads it, and a recipe starts
from it (model.from_pretrained). A source that is ours is a run, one of its checkpoints, or a model folder.

    parts      a language model and a vision tower -> a dense model with a new projector
    llava      LLaVA-1.5, in its original layout or in transformers' -> a dense model
    upcycle    a dense model -> a mixture of experts that computes what it did
    moe-llava  a released checkpoint of MoE-LLaVA -> a sparse model
    dense      a sparse model -> a dense one
    mocle      a checkpoint of MoCLE's authors, in the InstructBLIP that it was trained around -> a model with LoRA experts

    python tools/convert.py parts models/phi-2 models/clip-vit-large-patch14-336 -o models/phi-llava --dtype bfloat16
    python tools/convert.py llava models/llava-v1.5-7b -o models/llava --vision-tower models/clip-vit-large-patch14-336
    python tools/convert.py upcycle models/llava -o models/sparse --experts 4 --top-k 2 --router ltdr --dry-run
    python tools/convert.py upcycle runs/tune -o models/sparse --recipe ltdr.yaml router.tail_k=4
    python tools/convert.py moe-llava models/MoE-LLaVA-Phi2-2.7B-4e -o models/sparse --vision-tower models/clip
    python tools/convert.py dense runs/sparse -o models/dense --merge mean --plain
    python tools/convert.py mocle c64_t005.pth --base models/instructblip-vicuna-7b -o models/mocle --temperature 0.05
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from terminal import DONE, byte_progress, make_parser, parse_bytes, run

if TYPE_CHECKING:  # what needs torch is imported by the handler of a command, so that --help is quick
    from moe_lvlm.config.moe import MoEConfig
    from moe_lvlm.conversion.folder import Converted, Summary
    from moe_lvlm.conversion.original import OriginalOptions

# Flags of `upcycle` and the keys of a recipe's `moe` that they stand for.
_MOE_FLAGS = {
    "experts": "num_experts",
    "top_k": "top_k",
    "layers": "layers",
    "router": "router.kind",
    "fine_grained": "fine_grained",
    "shared_experts": "shared_experts",
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)  # argparse takes no key=value after an option by itself
    if rest and (args.command != "upcycle" or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = [*getattr(args, "overrides", ()), *rest]
    return run(lambda: _convert(args))


def _convert(args: argparse.Namespace) -> int:
    from moe_lvlm.checkpoint.model_folder import DEFAULT_SHARD_BYTES, as_dtype, check_target
    from moe_lvlm.conversion.folder import summarize, write_converted

    dtype = None if args.dtype is None else as_dtype(args.dtype)
    max_shard_bytes = args.max_shard_size or DEFAULT_SHARD_BYTES
    if not args.dry_run:
        check_target(args.output, is_overwriting=args.overwrite)
    converted: Converted = args.convert(args).to(dtype)
    summary = summarize(converted, max_shard_bytes=max_shard_bytes)
    _print(summary, converted)
    if args.dry_run:
        print(f"dry run: nothing was written to {args.output}")
        return DONE
    with byte_progress("writing", summary.num_bytes) as advance:
        written = write_converted(
            converted,
            args.output,
            max_shard_bytes=max_shard_bytes,
            is_overwriting=args.overwrite,
            advance=advance,
        )
    print(f"{written.bytes:,} bytes in {written.seconds:.1f} s; the model is in {written.path}")
    return DONE


def _print(summary: Summary, converted: Converted) -> None:
    print(
        f"{summary.num_tensors} tensors, {summary.num_bytes:,} bytes in {summary.num_files} file(s); "
        f"{summary.num_parameters:,} parameters, {summary.num_activated:,} of them activated for a token"
    )
    for line in summary.differences:
        print(f"config: {line}")
    for note in converted.notes:
        print(f"note: {note}")


def _parts(args: argparse.Namespace) -> Converted:
    from moe_lvlm.config.recipe import ModelSettings
    from moe_lvlm.conversion.parts import from_parts

    settings = ModelSettings.model_validate(
        {
            "vision_tower": {
                "from_pretrained": args.vision_tower,
                "feature_layer": args.feature_layer,
                "feature_select": args.feature_select,
            },
            "language_model": {"from_pretrained": args.language_model},
            "connector": {
                "kind": "mlp",
                "activation": args.projector_activation,
                "bias": not args.no_projector_bias,
            },
            "tokenizer": args.tokenizer,
            "image_processor": args.image_processor,
            "image_token": args.image_token,
            "trust_remote_code": args.trust_remote_code,
        }
    )
    return from_parts(settings, seed=args.seed)


def _original_options(args: argparse.Namespace) -> OriginalOptions:
    from moe_lvlm.conversion.original import OriginalOptions

    return OriginalOptions(
        vision_tower=args.vision_tower,
        tokenizer=args.tokenizer,
        image_processor=args.image_processor,
        image_token=args.image_token,
        seed=args.seed,
    )


def _llava(args: argparse.Namespace) -> Converted:
    from moe_lvlm.conversion.llava import from_llava

    return from_llava(args.source, _original_options(args))


def _moe_llava(args: argparse.Namespace) -> Converted:
    from moe_lvlm.conversion.moe_llava import from_moe_llava

    return from_moe_llava(args.source, _original_options(args), has_released_routing=args.released_routing)


def _upcycle(args: argparse.Namespace) -> Converted:
    from moe_lvlm.conversion.upcycling import upcycle_folder

    return upcycle_folder(args.source, _moe(args), router_seed=args.seed)


def _moe(args: argparse.Namespace) -> MoEConfig:
    from moe_lvlm.config.load import load_recipe
    from moe_lvlm.conversion.upcycling import read_moe_settings

    flags = [f"{key}={value}" for flag, key in _MOE_FLAGS.items() if (value := getattr(args, flag)) is not None]
    overrides = [*flags, *args.overrides]
    if args.recipe is None:
        return read_moe_settings(overrides)
    return load_recipe(args.recipe, [f"moe.{override}" for override in overrides]).moe


def _dense(args: argparse.Namespace) -> Converted:
    from moe_lvlm.conversion.dense import Merge, dense_folder

    return dense_folder(args.source, Merge.parse(args.merge), is_plain=args.plain)


def _mocle(args: argparse.Namespace) -> Converted:
    from moe_lvlm.conversion.released_mocle import from_released, write_clusters

    converted = from_released(args.source, args.base, temperature=args.temperature)
    if args.kmeans is not None and not args.dry_run:
        centres, table = map(Path, args.kmeans)
        write_clusters(centres, table, converted)
        print(f"the table of clusters is in {table}")
    return converted


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_parts(commands)
    original = _original_parser()
    for name, convert, text in (
        ("llava", _llava, "LLaVA-1.5, original layout or transformers', as a dense model"),
        ("moe-llava", _moe_llava, "a released checkpoint of MoE-LLaVA as a sparse model"),
    ):
        command = commands.add_parser(name, help=text, description=text, parents=[_output_parser(), original])
        command.add_argument("source", metavar="SOURCE", help="the model's folder (safetensors or .bin shards)")
        command.set_defaults(convert=convert)
        if name == "moe-llava":
            command.add_argument(
                "--released-routing",
                action="store_true",
                help="keep the experts' capacity, which drops tokens, and the noise on the second choice in training",
            )
    _add_upcycle(commands)
    _add_dense(commands)
    _add_mocle(commands)
    return parser


def _output_parser() -> argparse.ArgumentParser:
    """What all commands share."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    shared.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: as they are; new ones float32)",
    )
    shared.add_argument(
        "--max-shard-size",
        type=parse_bytes,
        metavar="SIZE",
        help="the most that a file of weights holds, such as 500MB (default: 5GB)",
    )
    shared.add_argument("--overwrite", action="store_true", help="replace a model folder that this program wrote")
    shared.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    return shared


def _processor_parser() -> argparse.ArgumentParser:
    """Tokenizer and image processor of a model that is put together."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--tokenizer", metavar="FOLDER", help="default: the model's own")
    shared.add_argument("--image-processor", metavar="FOLDER", help="default: the vision tower's")
    shared.add_argument("--image-token", default="<image>", help="added to the tokenizer if new (default: <image>)")
    shared.add_argument("--seed", type=int, default=0, help="where new weights are drawn from (default: 0)")
    return shared


def _original_parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False, parents=[_processor_parser()])
    shared.add_argument(
        "--vision-tower", metavar="FOLDER", help="the CLIP that the model was trained with (original layouts)"
    )
    return shared


def _add_parts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "a language model and a vision tower as a dense model with a new projector"
    command = commands.add_parser("parts", help=text, description=text, parents=[_output_parser(), _processor_parser()])
    command.add_argument("language_model", metavar="LANGUAGE_MODEL", help="a folder, or package:<pack>/<folder>")
    command.add_argument(
        "vision_tower", metavar="VISION_TOWER", help="the same; a whole CLIP or SigLIP gives its tower"
    )
    command.add_argument("--feature-layer", type=int, default=-2, help="hidden state of the tower (default: -2)")
    command.add_argument(
        "--feature-select", choices=("default", "full"), default="default", help="full: class token too"
    )
    command.add_argument("--projector-activation", default="gelu", metavar="NAME", help="default: gelu")
    command.add_argument("--no-projector-bias", action="store_true")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that configuration or tokenizer bring"
    )
    command.set_defaults(convert=_parts)


def _add_upcycle(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "a dense model as a mixture of experts; routers are drawn from --seed (in training: the recipe's seed + 1)"
    command = commands.add_parser("upcycle", help=text, description=text, parents=[_output_parser()])
    command.add_argument("source", metavar="SOURCE", help="a dense model of ours, or transformers' LLaVA")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="keys of a recipe's moe, such as top_k=1")
    command.add_argument("--recipe", help="a recipe whose moe is taken (a name or a .yaml file)")
    command.add_argument("--experts", type=int, metavar="N", help="experts a layer (default: 4)")
    command.add_argument("--top-k", type=int, metavar="K", help="experts that a token uses (default: 2)")
    command.add_argument("--layers", help="sparse, first_half, second_half, dense, or a list such as [0,2]")
    command.add_argument("--router", metavar="KIND", help="top_k (default), ltdr")
    command.add_argument("--fine-grained", type=int, metavar="M", help="cut an FFN into M experts (default: 1)")
    command.add_argument("--shared-experts", type=int, metavar="N", help="experts that all tokens pass (default: 0)")
    command.add_argument("--seed", type=int, default=0, help="of the routers (default: 0)")
    command.set_defaults(convert=_upcycle)


def _add_dense(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "a sparse model as a dense one, each layer's experts merged into one FFN"
    command = commands.add_parser("dense", help=text, description=text, parents=[_output_parser()])
    command.add_argument("source", metavar="SOURCE", help="a sparse model of ours")
    command.add_argument(
        "--merge", default="mean", help="mean (default), or expert:<g> for one (group of slices) alone"
    )
    command.add_argument("--plain", action="store_true", help="as transformers' LlavaForConditionalGeneration")
    command.set_defaults(convert=_dense)


def _add_mocle(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "a checkpoint of MoCLE's authors (LAVIS' layout) in its InstructBLIP, as a model with LoRA experts"
    command = commands.add_parser("mocle", help=text, description=text, parents=[_output_parser()])
    command.add_argument("source", metavar="FILE", help="the authors' .pth; nothing in it is run")
    command.add_argument("--base", required=True, metavar="FOLDER", help="InstructBLIP around the same language model")
    command.add_argument("--temperature", type=float, metavar="TAU", help="of the gates (default: what the file says)")
    command.add_argument(
        "--kmeans",
        nargs=2,
        metavar=("FILE", "TABLE"),
        help="the authors' clustering model (joblib; nothing in it is run), and the table of clusters to write; needs the "
        "sentence encoder",
    )
    command.set_defaults(convert=_mocle)


if __name__ == "__main__":
    sys.exit(main())
