"""A sample of the training data's instructions: their clusters, and their places in the plane (MoCLE figures 4, 5).

I instructions   W width of an embedding   D datasets   K clusters
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.analysis.json_object import read_object, whole_numbers
from moe_lvlm.data.clustering import encode_all
from moe_lvlm.data.clusters import ClusterTable, check_encoder
from moe_lvlm.data.encoder import DEFAULT_ENCODER, ENCODER_VARIABLE, Encode, load_encoder
from moe_lvlm.data.mixture import resolve_path

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

PER_DATASET = 100
"""Instructions of a dataset that are drawn in the plane, as in the paper."""
_PERPLEXITY = 30.0
_FEWEST = 4
_FORMAT = 1
_KEYS = ("format", "num_clusters", "datasets", "left_out")


class Instruction(NamedTuple):
    """text: without image marks. cluster: the row of the adapters' table that its gates read, None where not known."""

    text: str
    cluster: int | None


@dataclass(slots=True)
class InstructionSample:
    """Instructions of some records of each dataset.

    num_clusters: of the table, None without one. datasets: by name, in the order of the mixture. left_out: datasets
    that could not be read, with the reason.
    """

    num_clusters: int | None = None
    datasets: dict[str, list[Instruction]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def has_clusters(self) -> bool:
        """Whether each instruction's cluster is known."""
        return self.num_clusters is not None and bool(self.datasets)

    def clusters_by_dataset(self) -> IntArray:
        """Instructions by dataset and cluster, [D, K].

        Raises:
            ValueError: clusters are not known.
        """
        if self.num_clusters is None:
            raise ValueError("the instructions have no clusters; allowed: a sample of a run with data.clusters")
        rows = [
            np.bincount([one.cluster for one in found if one.cluster is not None], minlength=self.num_clusters)
            for found in self.datasets.values()
        ]
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.num_clusters)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        content = {
            "format": _FORMAT,
            "num_clusters": self.num_clusters,
            "datasets": {name: [list(one) for one in found] for name, found in self.datasets.items()},
            "left_out": self.left_out,
        }
        Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> InstructionSample:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is none of ours, or of another format version.
        """
        content = read_object(Path(path), what="a sample of instructions", version=_FORMAT, keys=_KEYS)
        num_clusters = content["num_clusters"]
        if num_clusters is not None:
            (num_clusters,) = whole_numbers([num_clusters], at_least=1, where=f"{path}: num_clusters")
        for name in ("datasets", "left_out"):
            if not isinstance(content[name], dict):
                raise ValueError(f"{path}: {name}: {content[name]!r}; allowed: an object")
        datasets = {
            name: [_read_instruction(one, num_clusters, f"{path}: dataset {name!r}") for one in found]
            for name, found in content["datasets"].items()
        }
        return InstructionSample(num_clusters, datasets, content["left_out"])


def _read_instruction(values: Any, num_clusters: int | None, where: str) -> Instruction:
    is_pair = isinstance(values, list) and len(values) == 2 and isinstance(values[0], str)
    is_known = is_pair and num_clusters is not None and type(values[1]) is int and 0 <= values[1] < num_clusters
    if not is_pair or not (is_known or (num_clusters is None and values[1] is None)):
        cluster = "null" if num_clusters is None else f"a cluster below {num_clusters}"
        raise ValueError(f"{where}: {values!r}; allowed: a text and {cluster}")
    return Instruction(*values)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionMap:
    """Instructions in the plane. dataset, instruction: of each point. positions: float64 [I, 2], equal for equal
    texts.

    same_dataset: of the distinct instructions the share whose nearest other one, by the embedding, is of the same
    dataset. by_chance: of the same, if the other one were drawn at random.
    """

    dataset: tuple[str, ...]
    instruction: tuple[Instruction, ...]
    positions: FloatArray
    same_dataset: float
    by_chance: float

    def save(self, path: str | Path) -> None:
        """Write the points to a JSON file, for other tools."""
        points = [
            {"dataset": dataset, "cluster": one.cluster, "instruction": one.text, "x": x, "y": y}
            for dataset, one, (x, y) in zip(self.dataset, self.instruction, self.positions.tolist(), strict=True)
        ]
        Path(path).write_text(json.dumps(points, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def map_instructions(sample: InstructionSample, encode: Encode, *, per_dataset: int = PER_DATASET) -> InstructionMap:
    """Embed up to so many instructions of each dataset and lay the distinct ones out by t-SNE, always the same way.

    A text counts once, however often it was drawn: a hundred equal captions would push all else to the edge.

    Raises:
        ValueError: fewer than four distinct instructions, or scikit-learn is missing.
    """
    chosen = [(name, one) for name, found in sample.datasets.items() for one in found[:per_dataset]]
    texts = sorted({one.text for _, one in chosen})
    if len(texts) < _FEWEST:
        raise ValueError(f"{len(texts)} distinct instructions; allowed: {_FEWEST} or more, in the plane")
    place = {text: index for index, text in enumerate(texts)}
    embeddings_IW = np.asarray(encode_all(texts, encode))
    rows = np.array([place[one.text] for _, one in chosen])
    names = tuple(name for name, _ in chosen)
    measured, by_chance = _nearest_of_same(rows, np.array(names), embeddings_IW)
    return InstructionMap(
        dataset=names,
        instruction=tuple(one for _, one in chosen),
        positions=_t_sne(embeddings_IW)[rows],
        same_dataset=measured,
        by_chance=by_chance,
    )


def run_encoder(recipe: dict[str, Any]) -> Encode:
    """The encoder that a run's instructions were clustered by, on the CPU; the default one without clusters.

    recipe: as it was written. MOE_LVLM_ENCODER says where the encoder lies.

    Raises:
        ValueError: the table of clusters or the encoder cannot be read, or they do not belong together.
    """
    data = recipe.get("data") or {}
    elsewhere = os.environ.get(ENCODER_VARIABLE)
    if data.get("clusters") is None:
        return load_encoder(elsewhere or DEFAULT_ENCODER, device="cpu")
    table = ClusterTable.load(resolve_path(data["clusters"], data.get("image_root", ".")))
    name = elsewhere or table.encoder
    encode = load_encoder(name, device="cpu")
    check_encoder(table, encode, name)
    return encode


def _t_sne(embeddings_IW: NDArray[np.float32]) -> FloatArray:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError(
            f"t-SNE: scikit-learn cannot be imported ({error}); install it with `pip install scikit-learn` "
            "(moe-lvlm's extra `clusters`)"
        ) from error
    perplexity = min(_PERPLEXITY, (len(embeddings_IW) - 1) / 3)
    fitting = TSNE(2, perplexity=perplexity, init="pca", random_state=0, n_jobs=1)
    return np.asarray(fitting.fit_transform(embeddings_IW), dtype=np.float64)


def _nearest_of_same(
    rows: IntArray, names: NDArray[np.str_], embeddings_IW: NDArray[np.float32]
) -> tuple[float, float]:
    """(measured, by chance) over distinct pairs of a text and a dataset, beside pairs of other texts."""
    pairs = sorted(set(zip(rows.tolist(), names.tolist(), strict=True)))
    row_P = np.array([row for row, _ in pairs])
    name_P = np.array([name for _, name in pairs])
    is_other_PP = row_P[:, None] != row_P[None, :]
    is_same_PP = name_P[:, None] == name_P[None, :]
    unit = embeddings_IW / np.linalg.norm(embeddings_IW, axis=1, keepdims=True)
    cosine_PP = np.where(is_other_PP, unit[row_P] @ unit[row_P].T, -np.inf)
    # Of equally near ones (a text that two datasets have) each counts as much.
    nearest_PP = (cosine_PP >= cosine_PP.max(axis=1, keepdims=True) - 1e-6) & is_other_PP
    measured = (nearest_PP & is_same_PP).sum(axis=1) / nearest_PP.sum(axis=1)
    by_chance = (is_other_PP & is_same_PP).sum(axis=1) / is_other_PP.sum(axis=1)
    return float(measured.mean()), float(by_chance.mean())
