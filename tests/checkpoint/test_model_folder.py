"""Model folders in Hugging Face's layout, written from tensors that are read while they are written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from moe_lvlm.checkpoint import files
from moe_lvlm.checkpoint.model_folder import as_dtype, check_target, plan_shards, tensor_bytes, write_model_folder
from moe_lvlm.checkpoint.source import LazySource, LazyTensor, open_source
from tests.checkpoint.conftest import FailWrite

DOCUMENTS = {"config.json": b'{"model_type": "x"}', "README.md": b"# A model\n"}


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "embed": torch.randn(10, 6),
        "experts": torch.randn(4, 50, 6).bfloat16(),
        "scale": torch.tensor(0.5),
        "ids": torch.arange(7),
        "head": torch.randn(10, 6),
    }


def source_of(tensors: dict[str, Tensor], reads: list[tuple[str, int, int]] | None = None) -> LazySource:
    def lazy(name: str, tensor: Tensor) -> LazyTensor:
        def read(start: int, stop: int) -> Tensor:
            if reads is not None:
                reads.append((name, start, stop))
            return tensor[start:stop] if tensor.dim() else tensor

        return LazyTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, read=read)

    return LazySource({name: lazy(name, tensor) for name, tensor in tensors.items()})


def test_one_file(tmp_path: Path) -> None:
    advanced: list[int] = []
    written = write_model_folder(
        tmp_path / "deep" / "m", source_of(weights()), documents=DOCUMENTS, advance=advanced.append
    )
    assert written.path == tmp_path / "deep" / "m"
    assert {file.name for file in written.path.iterdir()} == {"model.safetensors", "checksums.json", *DOCUMENTS}
    stored = load_file(written.path / "model.safetensors")
    assert stored.keys() == weights().keys()
    for name, tensor in weights().items():
        assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype
    assert (written.path / "README.md").read_bytes() == b"# A model\n"
    assert written.bytes == sum(file.stat().st_size for file in written.path.iterdir())
    assert sum(advanced) == 4 * 60 + 2 * 1200 + 4 + 8 * 7 + 4 * 60 == plan_shards(source_of(weights())).num_bytes


def test_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path / "m", source_of(weights()), documents=DOCUMENTS, max_shard_bytes=1000).path
    records = json.loads((path / "checksums.json").read_text())["files"]
    assert records.keys() | {"checksums.json"} == {file.name for file in path.iterdir()}
    for name, record in records.items():
        data = (path / name).read_bytes()
        assert record == {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def test_shards_and_their_index(tmp_path: Path) -> None:
    """At 600 bytes: embed, scale and ids (300); the experts, which are larger, alone; the head."""
    path = write_model_folder(tmp_path / "m", source_of(weights()), documents={}, max_shard_bytes=600).path
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2940
    assert set(index["weight_map"]) == set(weights())
    experts = index["weight_map"]["experts"]
    assert [name for name, file in index["weight_map"].items() if file == experts] == ["experts"]
    assert sorted(set(index["weight_map"].values())) == sorted(file.name for file in path.glob("model-*.safetensors"))
    for file in path.glob("model-*.safetensors"):
        assert file.name == experts or sum(tensor.nbytes for tensor in load_file(file).values()) <= 600
    opened = open_source(path)
    for name, tensor in weights().items():
        assert torch.equal(opened.read(name), tensor)


def test_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from tests.tiny_models import tiny_causal_lm

    model = tiny_causal_lm("llama")
    tensors = dict(model.named_parameters())
    documents = {"config.json": model.config.to_json_string().encode()}
    path = write_model_folder(
        tmp_path / "m",
        source_of({name: tensor.detach() for name, tensor in tensors.items()}),
        documents=documents,
        max_shard_bytes=20_000,
    ).path
    read, found = LlamaForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values())
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, tensors[name]), name


def test_rows_are_read_once_and_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lvlm.checkpoint.model_folder.CHUNK_BYTES", 100)  # 4 rows of embed, no row of experts
    reads: list[tuple[str, int, int]] = []
    write_model_folder(tmp_path / "m", source_of(weights(), reads), documents={})
    assert [(start, stop) for name, start, stop in reads if name == "embed"] == [(0, 4), (4, 8), (8, 10)]
    assert [(start, stop) for name, start, stop in reads if name == "experts"] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [(start, stop) for name, start, stop in reads if name == "scale"] == [(0, 1)]


def test_a_source_that_lies_is_caught(tmp_path: Path) -> None:
    wrong = LazySource({"a": LazyTensor(shape=(4, 2), dtype=torch.float32, read=lambda start, stop: torch.ones(3, 2))})
    with pytest.raises(ValueError, match="a: "):
        write_model_folder(tmp_path / "m", wrong, documents={})
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "m"
    write_model_folder(target, source_of(weights()), documents=DOCUMENTS)
    with pytest.raises(ValueError, match="exists already"):
        write_model_folder(target, source_of(weights()), documents={})
    write_model_folder(target, source_of({"a": torch.ones(2)}), documents={}, is_overwriting=True)
    assert {file.name for file in target.iterdir()} == {"model.safetensors", "checksums.json"}
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    check_target(foreign, is_overwriting=False)  # empty
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="was not written by this program"):
        write_model_folder(foreign, source_of(weights()), documents={}, is_overwriting=True)
    assert (foreign / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["../evil.json", "sub/x.json", "model.safetensors", "..", ""])
def test_documents_are_plain_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="allowed: the name of a file that holds no weights"):
        write_model_folder(tmp_path / "m", source_of(weights()), documents={name: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, fail_write: FailWrite, code: int) -> None:
    write_model_folder(tmp_path / "m", source_of({"a": torch.ones(2)}), documents={})
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    for failing in range(1, 100):
        fail_write(failing, code)
        try:
            write_model_folder(tmp_path / "m", source_of(weights()), documents=DOCUMENTS, is_overwriting=True)
        except OSError as error:
            assert error.errno == code
        else:
            break
        assert [file.name for file in tmp_path.iterdir()] == ["m"]
        assert before == {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    assert failing > 8
    assert (tmp_path / "m" / "README.md").exists()


def test_what_does_not_reach_the_disk_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are synced while the next one is written; an error of the first one still undoes everything."""
    synced: list[str] = []
    fsync = os.fsync

    def failing_once(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        if synced[-1].startswith("model-00001"):
            raise OSError(errno.EIO, "injected")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_once)
        with pytest.raises(OSError, match="injected"):
            write_model_folder(tmp_path / "m", source_of(weights()), documents=DOCUMENTS, max_shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []
    written = write_model_folder(tmp_path / "m", source_of(weights()), documents=DOCUMENTS, max_shard_bytes=1000)
    shards = sorted(file.name for file in written.path.glob("*.safetensors"))
    assert len(shards) == 2 and set(synced) >= set(shards)


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"1,000 bytes free, [\d,]+ needed"):
        write_model_folder(tmp_path / "m", source_of(weights()), documents={})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_trace(tmp_path: Path) -> None:
    half = tmp_path / ".m.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    write_model_folder(tmp_path / "m", source_of(weights()), documents={})
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_sizes_and_types_by_hand() -> None:
    source = source_of(weights())
    assert tensor_bytes(source, "experts") == 2 * 4 * 50 * 6
    assert tensor_bytes(source, "scale") == 4
    assert as_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype: 'int8'; allowed: float32, bfloat16, float16"):
        as_dtype("int8")
    with pytest.raises(ValueError, match="shard size: 0"):
        plan_shards(source, max_shard_bytes=0)


def test_lazy_sources_give_rows_and_types() -> None:
    tensors = weights()
    source = LazySource({name: LazyTensor.of(tensor).to(torch.float32) for name, tensor in tensors.items()})
    assert list(source.names()) == list(tensors)
    assert source.dtype("experts") == torch.float32
    assert torch.equal(source.read("experts", 1, 3), tensors["experts"][1:3].float())
    assert torch.equal(source.read("scale"), tensors["scale"])
    with pytest.raises(ValueError, match=r"rows \[1, 5\) wanted, has 4"):
        source.read("experts", 1, 5)
    with pytest.raises(ValueError, match="no weight 'x' among 5"):
        source.read("x")
    again = LazyTensor.from_source(source, "embed")
    assert again.to(None) is again
    assert torch.equal(again.read(2, 4), tensors["embed"][2:4])
