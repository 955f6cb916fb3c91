"""SIGKILL at any moment of a save: the last checkpoint that was reported is there, whole, and is what was saved."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import torch

from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.source import CheckpointSource
from moe_lvlm.checkpoint.verify import newest_valid
from tests.checkpoint.saver import save_forever

ROUNDS = 10


def test_a_killed_save_loses_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.saver"])  # torch is imported once, not in every round
    last = 0
    for seed in range(ROUNDS):
        reports, sending = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(tmp_path, last + 1, sending))
        process.start()
        sending.close()
        last = reports.recv()
        time.sleep(random.Random(seed).uniform(0, 0.4))
        process.kill()
        process.join()
        try:
            while True:
                last = reports.recv()
        except EOFError:
            reports.close()

        path = newest_valid(tmp_path, print, is_owner=True)
        assert path is not None
        found = Checkpoint(path).state["global_step"]
        assert found in (last, last + 1)  # killed between saving and reporting
        source = CheckpointSource(Checkpoint(path))
        for name in source.names():
            assert torch.equal(source.read(name), torch.full(source.shape(name), float(found)))
        last = found
