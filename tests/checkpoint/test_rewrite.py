"""Checkpoints that are written outside of training: what goes into which file, and what a failure leaves."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_lvlm.checkpoint import files
from moe_lvlm.checkpoint.folder import read_latest, temporary_path
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.rewrite import FlatTensor, FlatTensors, file_bytes, plan_files, total_bytes, write_checkpoint
from moe_lvlm.checkpoint.verify import verify
from tests.checkpoint.conftest import FailWrite

KIB, MIB = 2**10, 2**20


def flat(tensor: Tensor, step: float | None = None, reads: list[tuple[int, int]] | None = None) -> FlatTensor:
    def read(start: int, stop: int) -> Tensor:
        if reads is not None:
            reads.append((start, stop))
        return tensor.reshape(-1)[start:stop]

    return FlatTensor(dtype=tensor.dtype, shape=tuple(tensor.shape), read=read, step=step)


def some() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "experts": {
            "master": flat(torch.randn(4, 300, 70)),
            "exp_avg": flat(torch.randn(4, 300, 70), step=3.0),
            "exp_avg_sq": flat(torch.rand(4, 300, 70), step=3.0),
        },
        "norm": {"weight": flat(torch.randn(7).bfloat16())},
        "scale": {"weight": flat(torch.tensor(2.5, dtype=torch.float64))},
        "nothing": {"weight": flat(torch.zeros(0, 3))},
        "ids": {"weight": flat(torch.arange(5))},
    }


def values(tensors: FlatTensors) -> dict[tuple[str, str], Tensor]:
    return {
        (name, kind): tensor.read(0, tensor.numel).view(tensor.shape)
        for name, kinds in tensors.items()
        for kind, tensor in kinds.items()
    }


def write(directory: Path, name: str = "a-1", tensors: Mapping[str, Any] | None = None, **options: Any) -> Path:
    state = options.pop("state", {"global_step": 1})
    return write_checkpoint(
        directory, name, some() if tensors is None else tensors, config={"model_type": "x"}, state=state, **options
    ).path


@pytest.mark.parametrize("num_files", [1, 2, 5])
def test_what_is_written_is_read_back(tmp_path: Path, num_files: int) -> None:
    advanced: list[int] = []
    rng = [{"torch.cpu": torch.arange(4)}, {"torch.cpu": torch.arange(5)}]
    path = write(tmp_path, num_files=num_files, rng=rng, advance=advanced.append)
    checkpoint = Checkpoint(path)
    assert verify(path, is_finite_checked=True) == []
    for (name, kind), tensor in values(some()).items():
        assert torch.equal(checkpoint.read(name, kind, 0, tensor.numel()).view(tensor.shape), tensor), name  # type: ignore[arg-type]
    assert checkpoint.index.tensors["experts"]["exp_avg"].step == 3.0
    assert checkpoint.index.tensors["experts"]["master"].step is None
    assert [len(checkpoint.rng(rank)["torch.cpu"]) for rank in (0, 1)] == [4, 5]  # type: ignore[index]
    assert checkpoint.state == {"global_step": 1, "format_version": 1}
    assert sum(advanced) == total_bytes(some()) == 3 * 4 * 4 * 300 * 70 + 7 * 2 + 8 + 5 * 8
    assert read_latest(tmp_path) == "a-1"


def test_files_get_equal_shares_by_hand() -> None:
    """3 MiB in 3 files: the boundary at 1 MiB lies inside the first tensor, that at 2 MiB in the last."""
    tensors: dict[str, Any] = {
        "a": {"weight": flat(torch.zeros(3 * MIB // 8))},  # 1.5 MiB
        "b": {"weight": flat(torch.zeros(MIB // 16))},  # 0.25 MiB
        "c": {"weight": flat(torch.zeros(5 * MIB // 16))},  # 1.25 MiB
    }
    index = plan_files(tensors, 3)
    placed = {
        name: [(piece.start * 4, piece.stop * 4, piece.file[:10]) for piece in kinds["weight"].ranges]
        for name, kinds in index.tensors.items()
    }
    assert placed == {
        "a": [(0, MIB, "rank-00000"), (MIB, 3 * MIB // 2, "rank-00001")],
        "b": [(0, MIB // 4, "rank-00001")],
        "c": [(0, MIB // 4, "rank-00001"), (MIB // 4, 5 * MIB // 4, "rank-00002")],
    }
    assert file_bytes(index) == {f"rank-0000{number}.safetensors": MIB for number in range(3)}
    assert index.problems() == []


def test_small_tensors_stay_whole() -> None:
    tensors: dict[str, Any] = {f"t{index}": {"weight": flat(torch.zeros(1000))} for index in range(10)}
    index = plan_files(tensors, 4)
    assert all(len(kinds["weight"].ranges) == 1 for kinds in index.tensors.values())
    assert file_bytes(index) == {
        "rank-00000.safetensors": 12000,  # those that begin below 10,000 bytes of 40,000
        "rank-00001.safetensors": 8000,
        "rank-00002.safetensors": 12000,
        "rank-00003.safetensors": 8000,
    }


@pytest.mark.parametrize("num_files", [3, 7, 13, 49])
def test_shares_that_do_not_divide(num_files: int) -> None:
    """Huge sizes, where a floating-point boundary would be off by one file."""
    shape = (2**40 + 3, 3)
    tensors: dict[str, Any] = {
        name: {"weight": FlatTensor(dtype=torch.bfloat16, shape=shape, read=lambda start, stop: torch.empty(0))}
        for name in "abcde"
    }
    index = plan_files(tensors, num_files)
    sizes = file_bytes(index)
    assert len(sizes) == num_files
    assert max(sizes.values()) <= math.ceil(total_bytes(tensors) / num_files) + 2
    assert index.problems() == []


def test_pieces_are_read_once_in_order_and_are_small(tmp_path: Path) -> None:
    reads: list[tuple[int, int]] = []
    big = torch.randn(10 * MIB)  # 40 MiB
    write(tmp_path, tensors={"big": {"weight": flat(big, reads=reads)}}, num_files=2)
    assert [start for start, _ in reads] == [0, *(stop for _, stop in reads[:-1])]
    assert reads[-1][1] == big.numel()
    assert max(stop - start for start, stop in reads) * 4 <= files.CHUNK_BYTES


def test_nothing_at_all(tmp_path: Path) -> None:
    path = write(tmp_path, tensors={})
    assert verify(path) == []
    assert load_file(path / "rank-00000.safetensors") == {}


def test_what_may_be_replaced(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"a-1: exists already; choose another name"):
        write(tmp_path, is_overwriting=False)
    write(tmp_path, state={"global_step": 2})
    assert Checkpoint(tmp_path / "a-1").state["global_step"] == 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis: holds 'thesis\.tex', which no checkpoint does"):
        write(tmp_path, "thesis")
    (tmp_path / "link").symlink_to(tmp_path / "a-1")
    with pytest.raises(ValueError, match="link: is not a folder"):
        write(tmp_path, "link")
    with pytest.raises(ValueError, match="checkpoint name"):
        write(tmp_path, "../a")
    with pytest.raises(ValueError, match="number of files: 0"):
        write(tmp_path, "b", num_files=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1", "latest", "link", "thesis"]


def test_latest_goes_back_for_nobody(tmp_path: Path) -> None:
    said: list[str] = []
    write(tmp_path, "a-5", state={"global_step": 5}, log=said.append)
    write(tmp_path, "a-3", state={"global_step": 3}, log=said.append)
    assert read_latest(tmp_path) == "a-5"
    assert len(said) == 1 and "names a-5 as before" in said[0]
    write(tmp_path, "a-9", state={"global_step": 9, "has_optimizer": False})  # training could not go on from it
    assert read_latest(tmp_path) == "a-5"
    write(tmp_path, "a-7", state={"global_step": 7})
    assert read_latest(tmp_path) == "a-7"
    write(tmp_path / "other", "b", state={"global_step": 1, "has_optimizer": False})
    assert read_latest(tmp_path / "other") == "b"


def test_a_killed_writer_leaves_no_trace(tmp_path: Path) -> None:
    half = temporary_path(tmp_path, "a-1")
    half.mkdir(parents=True)
    (half / "rank-00000.safetensors").write_bytes(b"half")
    aside = tmp_path / ".a-1.old"  # killed between the two renames of a replacement
    aside.mkdir()
    other = temporary_path(tmp_path, "live")  # perhaps of a process that lives
    other.mkdir()
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".live.tmp", "a-1", "latest"]
    assert verify(tmp_path / "a-1") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, fail_write: FailWrite, code: int) -> None:
    """The k-th write fails, for every k until the writing comes through."""
    write(tmp_path, state={"global_step": 1})
    for failing in range(1, 200):
        fail_write(failing, code)
        try:
            write(tmp_path, state={"global_step": 2}, num_files=2)
        except OSError as error:
            assert error.errno == code
        else:
            break
        assert not temporary_path(tmp_path, "a-1").exists()
        if Checkpoint(tmp_path / "a-1").state["global_step"] == 1:
            assert verify(tmp_path / "a-1") == []
    assert failing > 15
    assert Checkpoint(tmp_path / "a-1").state["global_step"] == 2


def test_the_last_look_can_forbid_it(tmp_path: Path) -> None:
    def refuse() -> None:
        assert temporary_path(tmp_path, "a-1").exists()
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        write(tmp_path, before_publishing=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"1,000 bytes free, [\d,]+ needed"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []
