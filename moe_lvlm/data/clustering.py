"""Making a table of clusters: instructions of records, encoded and grouped by k-means, or by dataset.

K clusters   W width of an embedding   I instructions
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.config.recipe import Recipe, SourceSettings
from moe_lvlm.data.clusters import PROBE, ClusterTable, nearest_centres
from moe_lvlm.data.encoder import Encode
from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.instructions import instruction_hash
from moe_lvlm.data.layout import LLAVA, Layout

IN_MEMORY = 2**28
"""Numbers of embeddings (1 GiB) that are kept in memory; more go to a file."""
LARGE = 20_000
"""From so many instructions on k-means goes in mini-batches."""
_BATCH = 4096


def recipe_sources(recipe: Recipe, stage: str | None = None) -> list[SourceSettings]:
    """The datasets whose instructions a recipe's routers and gates meet, each once whatever its weight or ratio.

    stage: take this one's mixture; None takes those of the stage that upcycles or adapts and of all after it, or of all
    stages where none does.

    Raises:
        ValueError: no stage of this name.
    """
    names = [one.name for one in recipe.stages]
    if stage is not None:
        if stage not in names:
            raise ValueError(f"stage {stage!r}: not in recipe {recipe.name}; allowed: {', '.join(names)}")
        stages = [one for one in recipe.stages if one.name == stage]
    else:
        first = next((place for place, one in enumerate(recipe.stages) if one.upcycle or one.adapt), 0)
        stages = list(recipe.stages[first:])
    sources = [source for one in stages for source in one.mixture or recipe.data.mixture]
    return list({source.model_dump_json(exclude={"weight", "ratio"}): source for source in sources}.values())


def count_instructions(
    records: Iterable[object],
    counts: Counter[str],
    layout: Layout = LLAVA,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Add the instructions of each raw record to `counts`: all that its draws can give, each once; returns how many
    records could not be used. advance: told of each record."""
    num_bad = 0
    for raw in records:
        try:
            counts.update(layout.instructions(raw))
        except RecordFault:
            num_bad += 1
        advance(1)
    return num_bad


def encode_all(
    texts: Sequence[str], encode: Encode, *, chunk: int = 1024, advance: Callable[[int], None] = lambda count: None
) -> NDArray[np.float32]:
    """Embeddings [I, W] of texts, `chunk` at a time. advance: told of each so many texts done.

    Many are kept in a file without a name in place of memory (the folder for temporary files says where): 10 million of
    384 numbers take 15 GB.

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
            embeddings = _empty((len(texts), part.shape[1]))
        embeddings[places] = part
        advance(len(places))
    assert embeddings is not None, "no text to encode"
    return embeddings


def _empty(shape: tuple[int, int]) -> NDArray[np.float32]:
    if shape[0] * shape[1] <= IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    return np.memmap(tempfile.TemporaryFile(), dtype=np.float32, mode="w+", shape=shape)


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
    if available < len(fitted):
        chosen_I = np.sort(np.random.default_rng(seed).choice(len(fitted), size=available, replace=False))
        centres_KW = _k_means(embeddings_IW[chosen_I], weights_I[chosen_I], num_clusters, seed)
    else:
        centres_KW = _k_means(embeddings_IW[: len(fitted)], weights_I, num_clusters, seed)  # a view, no copy
    # Largest first. Ids are then taken from the centres as they are stored, as those of new instructions will be.
    ids_I = nearest_centres(centres_KW, embeddings_IW[: len(fitted)])
    sizes_K = np.bincount(ids_I, weights=weights_I, minlength=num_clusters)
    centres_KW = centres_KW[np.argsort(-sizes_K, kind="stable")]
    ids_I = nearest_centres(centres_KW, embeddings_IW)
    return _table(centres_KW, hashes, ids_I, encode, encoder=encoder, seed=seed)


def dataset_table(
    counts: Mapping[str, Mapping[str, int]],
    encode: Encode,
    *,
    encoder: str,
    assigned: Iterable[str] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> ClusterTable:
    """A table whose cluster i is dataset i, its centre the mean of the dataset's instructions (MoCLE table 7, Dataset).

    counts: name of each dataset -> how often each distinct instruction occurs. An instruction gets the nearest centre,
    which tells what belongs to no dataset where it belongs; `assigned`, `advance` as for `fit_clusters`. Its seed is 0.

    Raises:
        ValueError: a dataset without instructions, or two instructions with the same hash.
    """
    if empty := [name for name, count in counts.items() if not count]:
        raise ValueError(f"{empty[0]}: no instruction; a dataset's centre is the mean of its instructions")
    fitted = sorted(set().union(*counts.values()))
    texts = [*fitted, *sorted(set(assigned).difference(fitted))]
    hashes = _hashes(texts)
    embeddings_IW = encode_all(texts, encode, advance=advance)
    place = {text: index for index, text in enumerate(texts)}
    centres = []
    for count in counts.values():
        weights = np.array(list(count.values()), dtype=np.float64)
        sums_W = np.zeros(embeddings_IW.shape[1])
        rows = np.array([place[text] for text in count])
        for start in range(0, len(rows), _BATCH):
            part = slice(start, start + _BATCH)
            sums_W += weights[part] @ embeddings_IW[rows[part]].astype(np.float64)
        centres.append(sums_W / weights.sum())
    centres_KW = np.stack(centres).astype(np.float32)
    ids_I = nearest_centres(centres_KW, embeddings_IW)
    return _table(centres_KW, hashes, ids_I, encode, encoder=encoder, seed=0, datasets=tuple(counts))


def cluster_index(table: ClusterTable, counts: Mapping[str, int], *, shown: int = 5) -> dict[str, Any]:
    """What is in each cluster of a table, for people: as JSON.

    counts: how often each instruction occurs. shown: how many of the commonest are named.
    """
    members: list[list[tuple[str, int]]] = [[] for _ in range(table.num_clusters)]
    for text, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        cluster = table.find(text)
        assert cluster is not None, "a table of other instructions"
        members[cluster].append((text, count))
    clusters = [
        {
            "cluster": cluster,
            **({} if table.datasets is None else {"dataset": table.datasets[cluster]}),
            "instructions": sum(count for _, count in texts),
            "distinct": len(texts),
            "commonest": [{"instruction": text, "count": count} for text, count in texts[:shown]],
        }
        for cluster, texts in enumerate(members)
    ]
    return {
        "encoder": table.encoder,
        "seed": table.seed,
        "num_clusters": table.num_clusters,
        "instructions": sum(counts.values()),
        "distinct": len(counts),
        "clusters": clusters,
    }


def _table(
    centres_KW: NDArray[np.float32],
    hashes: NDArray[np.uint64],
    ids_I: NDArray[np.int32],
    encode: Encode,
    *,
    encoder: str,
    seed: int,
    datasets: tuple[str, ...] | None = None,
) -> ClusterTable:
    order = np.argsort(hashes)
    (probe_W,) = encode([PROBE])
    return ClusterTable(
        centres_KW=centres_KW,
        hashes_I=hashes[order],
        ids_I=ids_I[order],
        probe_W=probe_W,
        encoder=encoder,
        seed=seed,
        datasets=datasets,
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
