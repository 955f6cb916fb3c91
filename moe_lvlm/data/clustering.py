"""Making a table of clusters: instructions of records, encoded and grouped by k-means.

K clusters   W width of an embedding   I instructions
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.clusters import PROBE, ClusterTable, nearest_centres
from moe_lvlm.data.encoder import Encode
from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.instructions import first_instruction, instruction_hash
from moe_lvlm.data.mixture import resolve_path
from moe_lvlm.data.records import parse_record

LARGE = 20_000
"""From so many instructions on k-means goes in mini-batches."""
_BATCH = 4096


def recipe_files(recipe: Recipe, stage: str | None = None) -> list[Path]:
    """The files of records whose instructions a recipe's routers meet, each once whatever its weight.

    stage: take this one's mixture; None takes those of the stage that upcycles and of all after it, or of all stages
    where none upcycles.

    Raises:
        ValueError: no stage of this name, or records of another layout than LLaVA's.
    """
    names = [one.name for one in recipe.stages]
    if stage is not None:
        if stage not in names:
            raise ValueError(f"stage {stage!r}: not in recipe {recipe.name}; allowed: {', '.join(names)}")
        stages = [one for one in recipe.stages if one.name == stage]
    else:
        first = next((place for place, one in enumerate(recipe.stages) if one.upcycle), 0)
        stages = list(recipe.stages[first:])
    sources = [source for one in stages for source in one.mixture or recipe.data.mixture]
    for source in sources:
        if source.source != "llava_json":
            raise ValueError(
                f"{source.path}: source {source.source}, whose instructions are drawn anew each time; clusters are fitted "
                "on records of llava_json"
            )
    return list(dict.fromkeys(resolve_path(source.path, recipe.data.image_root) for source in sources))


def count_instructions(records: Iterable[object], counts: Counter[str]) -> int:
    """Add the first instruction of each raw record to `counts`; returns how many records could not be used."""
    num_bad = 0
    for raw in records:
        try:
            counts[first_instruction(parse_record(raw).turns)] += 1
        except RecordFault:
            num_bad += 1
    return num_bad


def encode_all(
    texts: Sequence[str], encode: Encode, *, chunk: int = 1024, advance: Callable[[int], None] = lambda count: None
) -> NDArray[np.float32]:
    """Embeddings [I, W] of texts, `chunk` at a time. advance: told of each so many texts done.

    Raises:
        ValueError: an embedding is not finite.
    """
    # The longest first: texts of a batch are of like length, and one that does not fit into memory shows at once.
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    embeddings: NDArray[np.float32] | None = None
    for start in range(0, len(order), chunk):
        places = order[start : start + chunk]
        part = encode([texts[index] for index in places])
        if not np.isfinite(part).all():
            raise ValueError("the encoder gave embeddings that are not finite")
        if embeddings is None:
            embeddings = np.empty((len(texts), part.shape[1]), dtype=np.float32)
        embeddings[places] = part
        advance(len(places))
    assert embeddings is not None, "no text to encode"
    return embeddings


def fit_clusters(
    counts: Mapping[str, int],
    encode: Encode,
    *,
    encoder: str,
    num_clusters: int,
    seed: int,
    assigned: Iterable[str] = (),
    sample: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> ClusterTable:
    """k-means over the embeddings of all instructions (LTDR appendix A.3, MoCLE). Cluster 0 is the largest.

    counts: how often each distinct instruction occurs; as many times it counts, as if each record's were clustered.
    encoder: the name that the table gives it. assigned: further instructions, which get the nearest cluster and move
    no centre. sample: fit the centres on so many distinct instructions, drawn by `seed`; all get their cluster.
    advance: told of texts encoded, in all as many as there are distinct ones.

    Raises:
        ValueError: fewer distinct instructions than clusters, or two with the same hash.
    """
    fitted = sorted(counts)
    available = len(fitted) if sample is None else min(sample, len(fitted))
    if not 1 <= num_clusters <= available:
        drawn = "" if available == len(fitted) else f" (of {len(fitted)}, by the sample)"
        raise ValueError(
            f"{num_clusters} clusters of {available} distinct instructions{drawn}; allowed: 1 to {available}"
        )
    texts = [*fitted, *sorted(set(assigned) - counts.keys())]
    hashes = _hashes(texts)
    embeddings_IW = encode_all(texts, encode, advance=advance)
    weights_I = np.array([counts[text] for text in fitted], dtype=np.float64)
    chosen_I = np.arange(len(fitted))
    if available < len(fitted):
        chosen_I = np.sort(np.random.default_rng(seed).choice(len(fitted), size=available, replace=False))
    centres_KW = _k_means(embeddings_IW[chosen_I], weights_I[chosen_I], num_clusters, seed)
    # Largest first. Ids are then taken from the centres as they are stored, as those of new instructions will be.
    ids_I = nearest_centres(centres_KW, embeddings_IW[: len(fitted)])
    sizes_K = np.bincount(ids_I, weights=weights_I, minlength=num_clusters)
    centres_KW = centres_KW[np.argsort(-sizes_K, kind="stable")]
    ids_I = nearest_centres(centres_KW, embeddings_IW)
    order = np.argsort(hashes)
    (probe_W,) = encode([PROBE])
    return ClusterTable(
        centres_KW=centres_KW,
        hashes_I=hashes[order],
        ids_I=ids_I[order],
        probe_W=probe_W,
        encoder=encoder,
        seed=seed,
    )


def _k_means(
    embeddings_IW: NDArray[np.float32], weights_I: NDArray[np.float64], num_clusters: int, seed: int
) -> NDArray[np.float32]:
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
    except ImportError as error:
        raise ValueError(
            f"k-means: scikit-learn cannot be imported ({error}); install it with `pip install scikit-learn` "
            "(moe-lvlm's extra `clusters`)"
        ) from error
    if len(embeddings_IW) < LARGE:
        fitting = KMeans(num_clusters, n_init=10, random_state=seed)
    else:
        fitting = MiniBatchKMeans(num_clusters, n_init=10, batch_size=_BATCH, random_state=seed)
    fitting.fit(embeddings_IW, sample_weight=weights_I)
    return np.ascontiguousarray(fitting.cluster_centers_, dtype=np.float32)


def _hashes(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Raises ValueError if two texts share a hash."""
    owners: dict[int, str] = {}
    for text in texts:
        other = owners.setdefault(instruction_hash(text), text)
        if other != text:
            raise ValueError(f"two instructions share a hash of 64 bits: {other!r} and {text!r}; leave one of them out")
    return np.array(list(owners), dtype=np.uint64)
