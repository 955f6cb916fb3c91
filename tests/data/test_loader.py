from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from moe_lvlm.data.balance import StepBalance, spread_evenly
from moe_lvlm.data.collator import Collator, pin_batch
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.data.loader import MicroBatch, StepLoader
from moe_lvlm.data.mixture import MixtureDataset
from moe_lvlm.data.order import StepOrder

from .conftest import MakeBuilder, MakeSource, conversation

NUM_RECORDS = 13
BAD = {2, 3, 7}

MakeLoader = Callable[..., StepLoader]


@pytest.fixture
def make_loader(make_source: MakeSource, make_builder: MakeBuilder) -> MakeLoader:
    records = [
        {"id": str(i), "image": "red.png", "conversations": conversation("<image> q", f"answer {i}")}
        if i % 2
        else {"id": str(i), "conversations": conversation("q", "" if i in BAD else f"answer {i}")}
        for i in range(NUM_RECORDS)
    ]
    for index in BAD & {i for i in range(NUM_RECORDS) if i % 2}:
        records[index]["image"] = "none.png"
    builder = make_builder()
    dataset = MixtureDataset([make_source(records)], [NUM_RECORDS], builder, seed=1)
    collator = Collator.for_processor(builder.processor)

    def make(micro_batch: int = 2, global_batch: int = 4, is_balanced: bool = False, **settings: int) -> StepLoader:
        order = StepOrder(seed=4, epoch_size=len(dataset), micro_batch=micro_batch, global_batch=global_batch)
        balance = StepBalance(dataset.length, spread_evenly) if is_balanced else None
        return StepLoader(dataset, order, collator, balance=balance, **settings)

    return make


def same(one: MicroBatch, other: MicroBatch) -> bool:
    a, b = one.batch, other.batch
    tensors = all(torch.equal(a[key], b[key]) for key in a if key != "routing")  # type: ignore[literal-required]
    names = [field.name for field in fields(a["routing"])]
    pairs = [(getattr(a["routing"], name), getattr(b["routing"], name)) for name in names]
    routing = all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)
    bad = [e.args for e in one.bad] == [e.args for e in other.bad]
    return set(a) == set(b) and tensors and routing and bad and one.num_samples == other.num_samples


def test_bad_records_are_left_out_and_never_replaced(make_loader: MakeLoader) -> None:
    loader = make_loader()
    for step, micro_batches in enumerate(loader.steps(0, 7)):
        assert len(micro_batches) == 2
        for draws, micro_batch in zip(loader.order.step(step), micro_batches, strict=True):
            wanted = {draw.position for draw in draws}  # one source, one copy: position is index
            assert {error.index for error in micro_batch.bad} == wanted & BAD
            assert micro_batch.num_samples == len(wanted - BAD)
            assert micro_batch.num_seen == 2
            assert micro_batch.batch["input_ids"].shape[0] == max(micro_batch.num_samples, 1)
            tokenizer = loader._loading._dataset.builder.processor.tokenizer  # type: ignore[attr-defined]
            texts = tokenizer.batch_decode(micro_batch.batch["input_ids"])
            assert all(sum(f"answer {i}<" in text for text in texts) == 1 for i in wanted - BAD)


def test_a_micro_batch_without_a_good_record_is_empty(make_loader: MakeLoader) -> None:
    loader = make_loader(micro_batch=1, global_batch=13)
    (micro_batches,) = loader.steps(0, 1)
    empty = [micro_batch for micro_batch in micro_batches if not micro_batch.num_samples]
    assert len(empty) == len(BAD)
    for micro_batch in empty:
        assert len(micro_batch.bad) == 1
        assert (micro_batch.batch["labels"] == -100).all()
        assert micro_batch.batch["input_ids"].shape == (1, 1)


def test_workers_and_restarts_change_nothing(make_loader: MakeLoader) -> None:
    plain = list(make_loader().steps(0, 5))
    torch.manual_seed(9)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    working = list(make_loader(num_workers=2).steps(0, 5))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert random.getstate() == states[2]
    resumed = list(make_loader(num_workers=1, prefetch=1).steps(3, 5))
    assert len(working) == len(plain) == 5
    for step in range(5):
        assert all(same(a, b) for a, b in zip(plain[step], working[step], strict=True))
    for step in (3, 4):
        assert all(same(a, b) for a, b in zip(plain[step], resumed[step - 3], strict=True))
    assert not same(plain[0][0], plain[0][1])


def test_every_world_size_sees_the_same_micro_batches(make_loader: MakeLoader) -> None:
    alone = list(make_loader(global_batch=8).steps(0, 3))
    for world_size in (2, 4):
        ranks = [
            list(make_loader(global_batch=8, rank=r, world_size=world_size).steps(0, 3)) for r in range(world_size)
        ]
        for step in range(3):
            for number, expected in enumerate(alone[step]):
                assert same(ranks[number % world_size][step][number // world_size], expected)


def test_balanced_steps_hold_the_same_samples(make_loader: MakeLoader) -> None:
    """Whatever the number of processes and workers, and wherever one begins."""
    plain = list(make_loader(micro_batch=2, global_batch=8).steps(0, 4))
    balanced = list(make_loader(micro_batch=2, global_batch=8, is_balanced=True).steps(0, 4))

    def rows(micro_batches: list[MicroBatch]) -> list[list[int]]:
        return sorted(
            one.batch["input_ids"][row][one.batch["attention_mask"][row] == 1].tolist()
            for one in micro_batches
            for row in range(one.num_samples)
        )

    for before, after in zip(plain, balanced, strict=True):
        assert rows(before) == rows(after)
        assert sum(len(one.bad) for one in before) == sum(len(one.bad) for one in after)
        assert [one.num_seen for one in after] == [2] * 4
    assert not all(same(one, other) for one, other in zip(plain[0], balanced[0], strict=True))
    for rank in range(2):
        loader = make_loader(
            micro_batch=2, global_batch=8, is_balanced=True, rank=rank, world_size=2, num_workers=2, prefetch=1
        )
        for step, mine in zip((2, 3), loader.steps(2, 4), strict=True):
            assert all(same(one, other) for one, other in zip(mine, balanced[step][rank::2], strict=True))


def test_waiting_is_counted(make_loader: MakeLoader) -> None:
    loader = make_loader()
    steps = loader.steps(0, 2)
    assert loader.seconds_waited == 0
    next(steps)
    first = loader.seconds_waited
    next(steps)
    assert 0 < first < loader.seconds_waited


def test_pinning_keeps_a_batch_as_it_is(make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU there is no such memory: copies stand in for it, so that what is left out shows."""
    pinned: list[torch.Tensor] = []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", copy)
    for micro_batch in next(make_loader().steps(0, 1)):
        pinned.clear()
        found = micro_batch.pin_memory()
        assert same(found, micro_batch)
        facts = [getattr(micro_batch.batch["routing"], field.name) for field in fields(micro_batch.batch["routing"])]
        wanted = [value for value in [*micro_batch.batch.values(), *facts] if isinstance(value, torch.Tensor)]
        assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in wanted}
        assert found.batch["input_ids"] is not micro_batch.batch["input_ids"]
        assert pin_batch(micro_batch.batch)["routing"].num_samples == micro_batch.num_samples


def test_an_abandoned_loader_stops_its_workers(make_loader: MakeLoader) -> None:
    import multiprocessing

    steps = make_loader(num_workers=2).steps(0, 1000)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_ranks_and_worlds_are_checked(make_loader: MakeLoader) -> None:
    with pytest.raises(ValueError, match="not a multiple of the 3 processes"):
        make_loader(world_size=3)
    with pytest.raises(ValueError, match="rank 2 is not below"):
        make_loader(rank=2, world_size=2)


def test_a_bad_record_travels_between_processes() -> None:
    error = BadRecordError("f.json", 3, None, "f/3", "reason")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.args, copy.reason, str(copy)) == (error.args, "reason", "f.json: record 3: reason")
