r"""Run a recipe's frozen vision tower once over every image that its stages draw, and keep the features: a recipe with
data.feature_cache=FOLDER then trains without running the tower or opening an image.

The features are those that the connector reads (after feature_layer and feature_select, before the projector), computed
in the run's train.precision. An image that several records or stages share is done once. FOLDER gets shards of 256 images
(safetensors) and index.json, which names the tower, the image processor and the choice of features by what they are; a run
with others refuses the folder. Images that cannot be read are listed in bad_images.jsonl, and their records are bad samples
of the run. A call that was interrupted or killed goes on where it stopped, and one with more data adds what is new.

Sizes: visual features x width x bytes an image. CLIP-L/336 has 576 x 1,024: 1.18 MB in bf16, so LLaVA's 558,128 images of
stage I come to 658 GB; CLIP-L/224 (256 x 1,024) to 293 GB. --dry-run says what a recipe needs. Reading 1.2 MB must be
faster than the tower is, so put FOLDER on a local or parallel disk.

Examples:
    python tools/cache_features.py quickstart --out cache/scenes --dtype fp32
    python tools/cache_features.py ltdr/ltdr_stablelm --stage align --out /data/clip --device cuda --batch 128 --workers 16
    python tools/cache_features.py recipe.yaml data.image_root=/data --out /data/clip --dry-run
    for PART in 1 2 3 4; do CUDA_VISIBLE_DEVICES=$((PART - 1)) python tools/cache_features.py recipe.yaml \
        --out /data/clip --part $PART/4 & done; wait

Exit status: 0 done (bad images or not), 2 a mistake in the arguments, the recipe or the folder, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from terminal import DONE, make_parser, run

if TYPE_CHECKING:
    from torch import Tensor

    from moe_lvlm.config.recipe import Recipe
    from moe_lvlm.data.feature_images import CacheImage
    from moe_lvlm.data.features import Fingerprint
    from moe_lvlm.models.processor import Processor
    from moe_lvlm.training.features import FrozenTower

SHARD_IMAGES = 256
SHOWN = 5  # bad images
_DTYPES = ("fp32", "bf16", "fp16")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `moe-lvlm recipes`, or the path of a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings in place of the recipe's")
    parser.add_argument("--stage", metavar="NAME", help="only this stage's images (default: those of all stages)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the recipe's data.feature_cache")
    parser.add_argument("--dtype", choices=_DTYPES, help="how features are stored (default: as train.precision)")
    parser.add_argument("--batch", type=_positive, default=32, metavar="N", help="images at once (default: 32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--workers", type=_positive, default=4, metavar="N", help="threads that decode (default: 4)")
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N parts; calls with others may run beside",
    )
    parser.add_argument("--dry-run", action="store_true", help="say how many images and bytes, and stop")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    return run(lambda: _cache(args))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An image for the tower, or why there is none. size: bytes of its file."""

    image: CacheImage
    size: int = 0
    pixels_CHW: Tensor | None = None
    fault: str | None = None


def _cache(args: argparse.Namespace) -> int:
    import torch  # after --help, which needs none

    from moe_lvlm.config.load import load_recipe
    from moe_lvlm.data.mixture import resolve_path
    from moe_lvlm.training.build import run_processor
    from moe_lvlm.training.features import check_towers, load_frozen_tower

    recipe = load_recipe(args.recipe, args.overrides)
    if args.out is None and recipe.data.feature_cache is None:
        raise ValueError("--out: neither it nor the recipe's data.feature_cache is given; allowed: a folder")
    out = args.out or resolve_path(str(recipe.data.feature_cache), recipe.data.image_root)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda, but torch sees no GPU; allowed: cpu")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_towers(recipe)
    images = _find(recipe, args.stage)
    processor = run_processor(recipe)
    tower = load_frozen_tower(recipe, device=device)
    fingerprint = tower.fingerprint(processor)
    dtype = args.dtype or recipe.train.precision
    shape = _shape(tower, processor, images)
    done = _done(out, fingerprint, shape, dtype)
    part, parts = args.part
    mine = images[part - 1 :: parts]
    todo = [image for image in mine if image.key not in done]
    needed = len(todo) * shape[0] * shape[1] * _bytes(dtype)
    print(
        f"{len(mine):,} images{f' of part {part}/{parts}' if parts > 1 else ''}, {len(mine) - len(todo):,} of them done; "
        f"{shape[0]} x {shape[1]} features in {dtype}: {_size(needed)} to write in {out}"
    )
    if args.dry_run:
        return DONE
    _make_room(out, needed)
    writer = _Writer(out, fingerprint, dtype=dtype, shape=shape)
    seconds, bad = _work(todo, tower, processor, writer, args, num_done=len(mine) - len(todo))
    num_images = writer.finish(bad, name="bad_images.jsonl" if parts == 1 else f"bad_images-{part}-of-{parts}.jsonl")
    rate = f", {len(todo) / seconds:,.1f} images/s" if todo else ""
    print(f"wrote {out}: {num_images:,} images in all{rate}. In the recipe: data.feature_cache={out.absolute()}")
    if bad:
        print(f"{len(bad):,} images cannot be used (listed in {out}); records with them will be bad samples")
        for one in bad[:SHOWN]:
            print(f"  {one.fault}")
    return DONE


def _find(recipe: Recipe, stage: str | None) -> list[CacheImage]:
    """The images of a stage, or of all, in a fixed order."""
    from moe_lvlm.data import packs
    from moe_lvlm.data.feature_images import find_images, stage_sources
    from moe_lvlm.data.mixture import open_records

    sources = [open_records(source, recipe.data.image_root) for source in stage_sources(recipe, stage)]
    with _progress() as progress:
        task = progress.add_task("records", total=sum(len(source) for source in sources))
        images, num_bad = find_images(
            sources, packs.resolve(recipe.data.image_root), lambda count: progress.advance(task, count)
        )
    if num_bad:
        print(f"{num_bad:,} records are bad and left out")
    if not images:
        raise ValueError(f"{recipe.name}: none of its records has an image; nothing to cache")
    return images


def _shape(tower: FrozenTower, processor: Processor, images: list[CacheImage]) -> tuple[int, int]:
    """(features, width) of the first image that can be read."""
    fault = None
    for image in images:
        loaded = _load_one(image, processor)
        if loaded.pixels_CHW is not None:
            _, num_features, width = tower.features(loaded.pixels_CHW[None]).shape
            return num_features, width
        fault = fault or loaded.fault
    raise ValueError(f"none of the {len(images):,} images can be read: {fault}")


def _done(out: Path, fingerprint: Fingerprint, shape: tuple[int, int], dtype: str) -> set[str]:
    """The images that the folder has already. Raises ValueError if they were made in another way."""
    from moe_lvlm.data.feature_shards import read_shards
    from moe_lvlm.data.features import differences

    shards = read_shards(out)
    if shards:
        first = shards[0]
        problems = differences(first.fingerprint, fingerprint)
        if (first.shape, first.dtype) != (shape, dtype):
            problems.append(f"features are {first.dtype} {first.shape} in the cache, {dtype} {shape} here")
        if problems:
            raise ValueError(
                f"--out: {out} holds features of another making: {'; '.join(problems)}; allowed: another folder"
            )
    return {image.key for shard in shards for image in shard.images}


def _make_room(out: Path, needed: int) -> None:
    from moe_lvlm.data.feature_shards import clear_leftovers

    out.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"--out: {out} has {_size(free)} free, {_size(needed)} are needed; allowed: a folder with room"
        )


class _Writer:
    """Takes features in groups of a shard; then the index, and the list of bad images."""

    def __init__(self, out: Path, fingerprint: Fingerprint, *, dtype: str, shape: tuple[int, int]) -> None:
        self.out = out
        self.shape = shape
        self._fingerprint = fingerprint
        self._dtype = dtype

    def write(self, loaded: list[_Loaded], parts_IMD: list[Tensor]) -> None:
        import torch

        from moe_lvlm.data.feature_shards import DTYPES, ShardImage, write_shard

        images = [ShardImage(one.image.key, one.size) for one in loaded]
        features = torch.cat([part.to(DTYPES[self._dtype]).cpu() for part in parts_IMD])
        write_shard(self.out, images, features, fingerprint=self._fingerprint)

    def finish(self, bad: list[_Loaded], *, name: str) -> int:
        """How many images the folder has."""
        from moe_lvlm.data.clusters import write_whole
        from moe_lvlm.data.feature_shards import write_index

        lines = [json.dumps({"image": one.image.key, "reason": one.fault}, ensure_ascii=False) for one in bad]
        write_whole(self.out / name, "".join(f"{line}\n" for line in lines).encode())
        return write_index(self.out)


def _work(
    todo: list[CacheImage],
    tower: FrozenTower,
    processor: Processor,
    writer: _Writer,
    args: argparse.Namespace,
    *,
    num_done: int,
) -> tuple[float, list[_Loaded]]:
    """Seconds, and the bad images."""
    bad: list[_Loaded] = []
    start = time.perf_counter()
    with _progress() as progress, ThreadPoolExecutor(args.workers) as pool:
        task = progress.add_task("images", total=num_done + len(todo), completed=num_done)
        stream = _load(pool, todo, processor, ahead=2 * args.batch + args.workers)
        try:
            while shard := list(islice(stream, SHARD_IMAGES)):
                bad += [one for one in shard if one.fault is not None]
                good = [one for one in shard if one.fault is None]
                if good:
                    writer.write(good, [_features(tower, batch, writer) for batch in _batches(good, args.batch)])
                progress.advance(task, len(shard))
        finally:
            pool.shutdown(cancel_futures=True)
    return max(time.perf_counter() - start, 1e-9), bad


def _features(tower: FrozenTower, batch: list[_Loaded], writer: _Writer) -> Tensor:
    """[I, M, D] of a batch. Raises ImageSizeError where an image's number of features is not that of the others."""
    import torch

    from moe_lvlm.data.errors import ImageSizeError

    pixels = [one.pixels_CHW for one in batch if one.pixels_CHW is not None]
    if len({image.shape for image in pixels}) == 1:
        features = tower.features(torch.stack(pixels))
        if features.shape[1:] == writer.shape:
            return features
    sizes = {tuple(image.shape[-2:]): one.image.key for one, image in zip(batch, pixels, strict=True)}
    raise ImageSizeError(
        f"the image processor gave sizes (height, width) {', '.join(f'{size} ({key})' for size, key in sizes.items())}, not "
        f"all of which make {writer.shape[0]} features; allowed: an image processor with a fixed size or crop_size"
    )


def _load(
    pool: ThreadPoolExecutor, images: Iterable[CacheImage], processor: Processor, *, ahead: int
) -> Iterator[_Loaded]:
    """The images in their order, `ahead` of them under way."""
    waiting: deque[Future[_Loaded]] = deque()
    for image in images:
        waiting.append(pool.submit(_load_one, image, processor))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _load_one(image: CacheImage, processor: Processor) -> _Loaded:
    from moe_lvlm.data.errors import RecordFault
    from moe_lvlm.data.images import load_image, resolve_image
    from moe_lvlm.data.sample import process_image

    try:
        size = resolve_image(image.root, image.path).stat().st_size
        return _Loaded(image, size, process_image(processor, load_image(image.root, image.path)))
    except RecordFault as fault:
        return _Loaded(image, fault=fault.reason)


def _batches(loaded: list[_Loaded], size: int) -> Iterator[list[_Loaded]]:
    return (loaded[start : start + size] for start in range(0, len(loaded), size))


class _Rate(ProgressColumn):
    """Images, or records, a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f}/s")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number above 0")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: I/N with 1 <= I <= N, such as 3/8")
    return int(found[1]), int(found[2])


def _bytes(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def _size(num_bytes: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} kB"


if __name__ == "__main__":
    sys.exit(main())
