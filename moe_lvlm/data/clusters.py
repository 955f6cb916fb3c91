"""Clusters of instructions: the table in which they are kept, and the cluster of any instruction.

K clusters   W width of an embedding   I known instructions   N texts
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moe_lvlm.data.encoder import ENCODER_VARIABLE, Encode, load_encoder
from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.instructions import instruction_hash

FACTS = "instruction_clusters"
"""The one key of the file's metadata. It holds JSON: several keys would come in another order each time."""
FORMAT_VERSION = 1
PROBE = "What is in the image?"
"""Text whose embedding is kept in the table: by it another encoder than the table's is found out."""
_LEAST_COSINE = 0.98  # the same encoder in bfloat16 or another version of its library stays above it
_DTYPES = {"centres": np.float32, "hashes": np.uint64, "ids": np.int32, "probe": np.float32}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ClusterTable:
    """The centres of all clusters, and the cluster of every instruction that was there when they were computed.

    centres_KW: float32. hashes_I: uint64, `instruction_hash` of the known instructions, ascending. ids_I: int32, their
    clusters. probe_W: float32, the encoder's embedding of PROBE. encoder: its name. seed: of the k-means. datasets: names
    of the datasets whose means the centres are, in order; None for a table of k-means.
    """

    centres_KW: NDArray[np.float32]
    hashes_I: NDArray[np.uint64]
    ids_I: NDArray[np.int32]
    probe_W: NDArray[np.float32]
    encoder: str
    seed: int
    datasets: tuple[str, ...] | None = None

    @property
    def num_clusters(self) -> int:
        return int(self.centres_KW.shape[0])

    @property
    def width(self) -> int:
        return int(self.centres_KW.shape[1])

    def find(self, text: str) -> int | None:
        """The cluster of a known instruction; None for another one."""
        wanted = np.uint64(instruction_hash(text))
        place = int(np.searchsorted(self.hashes_I, wanted))
        is_known = place < len(self.hashes_I) and self.hashes_I[place] == wanted
        return int(self.ids_I[place]) if is_known else None

    def nearest(self, embeddings_NW: NDArray[np.float32]) -> NDArray[np.int32]:
        """The cluster whose centre is nearest to each embedding (Euclidean, the lowest of equal ones), int32 [N]."""
        return nearest_centres(self.centres_KW, embeddings_NW)

    def save(self, path: Path) -> None:
        """Write the table as one safetensors file, which appears whole or not at all."""
        tensors: dict[str, NDArray[Any]] = {
            "centres": self.centres_KW,
            "hashes": self.hashes_I,
            "ids": self.ids_I,
            "probe": self.probe_W,
        }
        facts: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "encoder": self.encoder,
            "num_clusters": self.num_clusters,
            "seed": self.seed,
        }
        if self.datasets is not None:
            facts["datasets"] = list(self.datasets)
        write_whole(path, save(tensors, metadata={FACTS: json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path) -> ClusterTable:
        """Read a table. Raises DataFileError with what is wrong with the file."""
        if not path.is_file():
            raise DataFileError(f"{path}: no such file; allowed: a table of clusters, written by tools/fit_clusters.py")
        try:
            with safe_open(path, framework="numpy") as file:
                facts = _read_facts(path, file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise DataFileError(f"{path}: not a safetensors file ({error})") from error
        fault = _tensor_fault(tensors) or _fact_fault(facts, tensors)
        if fault is not None:
            raise DataFileError(f"{path}: {fault}; write the table anew with tools/fit_clusters.py")
        return cls(
            centres_KW=tensors["centres"],
            hashes_I=tensors["hashes"],
            ids_I=tensors["ids"],
            probe_W=tensors["probe"],
            encoder=facts["encoder"],
            seed=facts["seed"],
            datasets=None if "datasets" not in facts else tuple(facts["datasets"]),
        )


class InstructionClusters:
    """The cluster of any instruction: by the table if it is known, else that of the nearest centre.

    The encoder is loaded at the first unknown instruction, and is used on the CPU: worker processes of a loader, which
    ask too, cannot share a GPU that their parent holds.

    encoder: a folder or hub name in place of the table's; None takes what MOE_LVLM_ENCODER names, or the table's. A
    table holds the embedding of one text, by which another encoder is refused.
    """

    def __init__(self, table: ClusterTable, *, encoder: str | None = None, encode: Encode | None = None) -> None:
        """encode: used in place of an encoder that is loaded."""
        self.table = table
        self._encoder = encoder or os.environ.get(ENCODER_VARIABLE) or table.encoder
        self._given = encode
        self._checked: Encode | None = None
        self._found: dict[str, int] = {}  # unknown instructions met so far

    def cluster(self, text: str) -> int:
        """The cluster of an instruction. Raises ValueError if it is unknown and the encoder cannot be loaded."""
        known = self.table.find(text)
        if known is not None:
            return known
        if text not in self._found:
            (self._found[text],) = self.table.nearest(self._load(text)([text])).tolist()
        return self._found[text]

    def _load(self, text: str) -> Encode:
        if self._checked is None:
            try:
                encode = self._given or load_encoder(self._encoder, device="cpu")
                check_encoder(self.table, encode, self._encoder)
            except ValueError as error:
                raise ValueError(
                    f"the table of clusters does not hold the instruction {_cut(text)!r}, and for its nearest centre "
                    f"the encoder is needed: {error}"
                ) from error
            self._checked = encode
        return self._checked


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def nearest_centres(centres_KW: NDArray[np.float32], embeddings_NW: NDArray[np.float32]) -> NDArray[np.int32]:
    """For each embedding the nearest centre, int32 [N]; the lowest of equal ones."""
    centres = centres_KW.astype(np.float64)
    nearest = []
    for start in range(0, len(embeddings_NW), 8192):  # bounds the memory of the distances
        block = embeddings_NW[start : start + 8192].astype(np.float64)
        # |e - c|^2 without |e|^2, which is the same for every centre
        nearest.append(((centres**2).sum(axis=1) - 2 * block @ centres.T).argmin(axis=1))
    return np.concatenate(nearest or [np.empty(0)]).astype(np.int32)


def check_encoder(table: ClusterTable, encode: Encode, name: str) -> None:
    """Raises ValueError if an encoder does not embed PROBE as the table's own did."""
    (probe_W,) = encode([PROBE])
    if probe_W.shape != table.probe_W.shape:
        raise ValueError(
            f"encoder {name!r}: its embeddings are {probe_W.shape[-1]} wide, the table's {table.width}; allowed: "
            f"{table.encoder}"
        )
    cosine = float(probe_W @ table.probe_W / (np.linalg.norm(probe_W) * np.linalg.norm(table.probe_W)))
    if not cosine >= _LEAST_COSINE:
        raise ValueError(
            f"encoder {name!r}: it is not the one that made the table (a text's embeddings have a cosine of "
            f"{cosine:.3f}); allowed: {table.encoder}"
        )


def _tensor_fault(tensors: dict[str, NDArray[Any]]) -> str | None:
    if tensors.keys() != _DTYPES.keys():
        return f"it holds the tensors {sorted(tensors)}; allowed: {sorted(_DTYPES)}"
    for name, dtype in _DTYPES.items():
        num_axes = 2 if name == "centres" else 1
        if tensors[name].dtype != dtype or tensors[name].ndim != num_axes:
            return f"{name} is {tensors[name].dtype} {tensors[name].shape}; allowed: {np.dtype(dtype)}, {num_axes} axes"
    centres, hashes, ids, probe = (tensors[name] for name in _DTYPES)
    num_clusters, width = centres.shape
    if not num_clusters or not width or probe.shape != (width,):
        return f"centres are {centres.shape} and the probe {probe.shape}; allowed: [K, W] and [W], none of them 0"
    if not (np.isfinite(centres).all() and np.isfinite(probe).all() and np.any(probe != 0)):
        return "centres or probe hold what is not a number, or the probe is 0"
    if hashes.shape != ids.shape or not (hashes[1:] > hashes[:-1]).all():
        return f"{len(hashes)} hashes for {len(ids)} ids, or hashes that do not ascend"
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= num_clusters):
        return f"ids from {ids.min()} to {ids.max()}; allowed: 0 to {num_clusters - 1}"
    return None


def _read_facts(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        facts = json.loads(metadata[FACTS])
        version = facts["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataFileError(
            f"{path}: no table of clusters, its metadata hold {sorted(metadata)}; allowed: {FACTS} as "
            "tools/fit_clusters.py writes it"
        ) from error
    if version != FORMAT_VERSION:
        raise DataFileError(f"{path}: format_version {version!r}; this version of moe_lvlm reads {FORMAT_VERSION}")
    return facts


def _fact_fault(facts: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> str | None:
    if not (isinstance(facts.get("encoder"), str) and facts["encoder"]):
        return f"encoder is {facts.get('encoder')!r}; allowed: a name"
    if facts.get("num_clusters") != len(tensors["centres"]):
        return f"num_clusters is {facts.get('num_clusters')!r}, but there are {len(tensors['centres'])} centres"
    if not isinstance(facts.get("seed"), int):
        return f"seed is {facts.get('seed')!r}; allowed: a whole number"
    names = facts.get("datasets")
    if "datasets" in facts and not (
        isinstance(names, list) and len(names) == facts["num_clusters"] and all(isinstance(name, str) for name in names)
    ):
        return f"datasets is {names!r}; allowed: {facts['num_clusters']} names"
    return None


def _cut(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
