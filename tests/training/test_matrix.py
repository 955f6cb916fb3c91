"""Saved under one topology, continued under another: everything is restored bit for bit, and training goes on alike.

Topologies are world {1, 2, 4} x expert-parallel size {1, 2, 4} x ZeRO {1, 2, 3}, where the size divides the world: 18.
Each continues at two others, in bf16 a third of them at one; the whole 18 x 17 grid is a slow test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from moe_lvlm.checkpoint.layout import read_json
from tests.tiny_run import write_run_inputs
from tests.training.launching import Server, events
from tests.training.states import contents

SAVED, LAST = 3, 8  # steps
STAGE = {
    "name": "sparse", "upcycle": True, "train": ["moe", "connector"], "steps": LAST, "micro_batch": 2,
    "global_batch": 8, "learning_rate": 1.0e-2,
}  # fmt: skip
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
NORM_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
NUM_TARGETS = 2
BATCH = 36  # continuations of one set of processes, which end within the server's time limit


class Topology(NamedTuple):
    zero: int
    world: int
    expert_parallel: int

    @property
    def name(self) -> str:
        return f"w{self.world}e{self.expert_parallel}z{self.zero}"

    @property
    def overrides(self) -> list[str]:
        return [f"parallel.expert_parallel_size={self.expert_parallel}", f"parallel.deepspeed=zero{self.zero}"]


TOPOLOGIES = tuple(
    Topology(zero, world, size) for zero in (1, 2, 3) for world in (1, 2, 4) for size in (1, 2, 4) if world % size == 0
)


class Resume(NamedTuple):
    source: Topology
    target: Topology

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.target.name}"


# A rotation of the order, so that every topology is continued at; and a second target, of one or two processes, which
# cost less.
SMALL = tuple(one for one in TOPOLOGIES if one.world < 4)
ROTATED = tuple(Resume(source, TOPOLOGIES[(place + 9) % len(TOPOLOGIES)]) for place, source in enumerate(TOPOLOGIES))
SCHEDULE = (*ROTATED, *(Resume(source, SMALL[(place + 8) % len(SMALL)]) for place, source in enumerate(TOPOLOGIES)))
# In bf16 every world and expert-parallel size once, every ZeRO stage twice.
BF16_SOURCES = tuple(TOPOLOGIES[6 * zero + place] for place, zero in enumerate((0, 1, 1, 2, 2, 0)))
GRID = tuple(Resume(source, target) for source in TOPOLOGIES for target in TOPOLOGIES if source != target)


@dataclass(frozen=True)
class Matrix:
    """Unbroken runs, and those that continue from their checkpoints, in one precision."""

    server: Server
    folder: Path
    precision: str

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def unbroken(self, topology: Topology) -> Path:
        return self.folder / "unbroken" / topology.name

    def checkpoint(self, topology: Topology, step: int = SAVED) -> Path:
        return self.unbroken(topology) / "checkpoints" / f"sparse-{step:06d}"

    def continued(self, resume: Resume) -> Path:
        return self.folder / "continued" / resume.name

    @property
    def schedule(self) -> list[Resume]:
        """What is tried in every run of the tests."""
        if self.precision == "fp32":
            return list(SCHEDULE)
        return [resume for resume in ROTATED if resume.source in BF16_SOURCES]

    def run(self, resumes: Sequence[Resume]) -> None:
        """Train all sources that are still missing, then continue."""
        missing = {resume.source for resume in resumes if not self.unbroken(resume.source).exists()}
        for world, topologies in by_world(sorted(missing), sorted(missing)).items():
            plan = [{"overrides": self._overrides(one, self.unbroken(one))} for one in topologies]
            self._start("train_topologies", plan, world)
        for world, some in by_world([one.target for one in resumes], resumes).items():
            plan = [
                {
                    "overrides": self._overrides(one.target, self.continued(one)),
                    "checkpoint": str(self.checkpoint(one.source)),
                }
                for one in some
            ]
            for first in range(0, len(plan), BATCH):
                self._start("continue_topologies", plan[first : first + BATCH], world)

    def _overrides(self, topology: Topology, folder: Path) -> list[str]:
        return [*topology.overrides, f"train.precision={self.precision}", f"output_dir={folder}"]

    def _start(self, function: str, plan: list[dict[str, Any]], world: int) -> None:
        path = self.folder / "plan.json"
        path.write_text(json.dumps(plan))
        self.server.run([function, str(self.recipe), str(path)], world=world)


def by_world(topologies: Sequence[Topology], values: Sequence[Any]) -> Mapping[int, list[Any]]:
    """Values by the world size of the topology at the same place."""
    found: dict[int, list[Any]] = {}
    for topology, value in zip(topologies, values, strict=True):
        found.setdefault(topology.world, []).append(value)
    return found


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def matrix(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_run_inputs(folder, stages=[STAGE])
    settings = yaml.safe_load(path.read_text())
    settings["train"]["checkpoint"] = {"every": SAVED, "keep_last": 100}
    settings["model"]["language_model"]["from_config"]["num_hidden_layers"] = 2  # a sparse one and a dense one
    path.write_text(yaml.safe_dump(settings))
    return Matrix(server, folder, request.param)


def assert_same_step(found: Mapping[str, Any], expected: Mapping[str, Any], precision: str, what: str) -> None:
    for key in ("tokens", "learning_rate", "epoch", "global_step"):
        assert found[key] == expected[key], what
    assert found["loss"] == pytest.approx(expected["loss"], abs=LOSS_TOLERANCE[precision]), what
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], abs=NORM_TOLERANCE[precision]), what


def assert_same_state(found: Path, expected: Path, what: str) -> None:
    """The training state but for the topology in which it was saved."""
    topology = {"world_size", "expert_parallel_size", "zero_stage", "saved_world_size"}
    left, right = (read_json(path / "state.json") for path in (found, expected))
    assert left.keys() == right.keys(), what
    for key in left.keys() - topology:
        assert left[key] == right[key], (what, key)


def assert_goes_on(matrix: Matrix, resume: Resume) -> None:
    folder, source = matrix.continued(resume), matrix.checkpoint(resume.source)
    assert contents(folder / "restored") == contents(source), resume.name
    assert_same_state(folder / "restored", source, resume.name)
    steps, expected = events(folder).steps(), events(matrix.unbroken(resume.source)).steps()
    assert sorted(steps) == [("sparse", step) for step in range(SAVED + 1, LAST + 1)]
    for place, values in steps.items():
        assert_same_step(values, expected[place], matrix.precision, f"{resume.name} step {place[1]}")
    assert_same_state(
        folder / "checkpoints" / f"sparse-{LAST:06d}", matrix.checkpoint(resume.source, LAST), resume.name
    )


def test_schedule_changes_every_axis() -> None:
    assert len(TOPOLOGIES) == len(set(TOPOLOGIES)) == 18
    for source in TOPOLOGIES:
        targets = [resume.target for resume in SCHEDULE if resume.source == source]
        assert len(set(targets) - {source}) == NUM_TARGETS
        assert any(resume.target == source for resume in SCHEDULE)
        for axis in Topology._fields:
            assert any(getattr(target, axis) != getattr(source, axis) for target in targets), (source, axis)
    assert len(set(GRID)) == 18 * 17
    assert set(SCHEDULE) < set(GRID)
    assert sorted((one.world, one.expert_parallel) for one in BF16_SOURCES) == sorted(
        {(one.world, one.expert_parallel) for one in TOPOLOGIES}
    )
    assert sorted(one.zero for one in BF16_SOURCES) == [1, 1, 2, 2, 3, 3]


@pytest.mark.distributed
def test_continues_elsewhere(matrix: Matrix) -> None:
    matrix.run(matrix.schedule)
    for resume in matrix.schedule:
        assert_goes_on(matrix, resume)


@pytest.mark.slow
@pytest.mark.distributed
def test_whole_grid(matrix: Matrix) -> None:
    rest = [resume for resume in GRID if resume not in matrix.schedule]
    matrix.run(rest)
    for resume in rest:
        assert_goes_on(matrix, resume)
