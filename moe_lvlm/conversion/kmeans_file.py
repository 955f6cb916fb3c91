"""Centres out of a `joblib` file of scikit-learn's k-means, without running what such a file may hold.

joblib pickles the object and puts the bytes of each array behind the description of it. Here a pickle may name scikit-
learn's k-means, joblib's description of an array, and numpy's plain types; any other name makes the file unreadable.

K clusters   W width of an embedding
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.data.errors import DataFileError


class _Inert:
    """Data of an object whose class is not wanted: attributes are set, nothing is called."""


class _Array(_Inert):
    """joblib's description of an array, whose bytes follow."""


def _only_data(*arguments: object) -> _Inert:
    return _Inert()


_CORE = tuple(f"{core}.multiarray" for core in ("numpy.core", "numpy._core"))
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{
        (f"sklearn.cluster.{module}", name): _Inert
        for module in ("_kmeans", "k_means_")
        for name in ("KMeans", "MiniBatchKMeans")
    },
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _Array,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    **{(core, "scalar"): _only_data for core in _CORE},
}


class _Unpickler(pickle._Unpickler):  # the one in Python: joblib puts raw bytes between the pickle's own
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        super().load_build()  # type: ignore[misc]
        if isinstance(self.stack[-1], _Array):  # type: ignore[attr-defined]
            self.stack[-1] = self._read(self.stack[-1])  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def _read(self, described: Any) -> NDArray[Any]:
        dtype = described.dtype
        if dtype.hasobject:
            raise pickle.UnpicklingError("it holds an array of objects")
        if getattr(described, "numpy_array_alignment_bytes", None) is not None:
            (padding,) = self._file.read(1)
            self._file.read(padding)
        count = int(np.prod(described.shape, dtype=np.int64))
        data = self._file.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise pickle.UnpicklingError("it ends within an array")
        array = np.frombuffer(data, dtype)
        return array.reshape(described.shape, order=described.order)


def read_centres(path: Path) -> NDArray[np.float32]:
    """The centres [K, W] of a k-means that `joblib.dump` has written without compression.

    Raises:
        DataFileError: no such file, another object, or names in it that are none of a k-means.
    """
    if not path.is_file():
        raise DataFileError(f"{path}: no such file; allowed: a k-means of scikit-learn, written by joblib")
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a torn or hostile pickle can fail in any way; all are told alike
        raise DataFileError(
            f"{path}: cannot be read as a k-means that joblib has written without compression ({error})"
        ) from error
    centres = getattr(found, "cluster_centers_", None)
    if not isinstance(centres, np.ndarray) or centres.ndim != 2 or not np.isfinite(centres).all():
        raise DataFileError(f"{path}: holds no cluster_centers_ [K, W]; allowed: a fitted k-means of scikit-learn")
    return centres.astype(np.float32)
