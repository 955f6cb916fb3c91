"""Experts that come and go: what is decided, by hand; and engines of all kinds against a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.dynamic import DynamicRouter
from moe_lvlm.routing.types import Modality
from moe_lvlm.training.adaptation import ExpertAdaptation, plan_change
from tests.parallel.plain_loop import groups, step_loss
from tests.parallel.problems import CLIP, EPS, LEARNING_RATE
from tests.parallel.rank_server import RankServer
from tests.training.adapting import ADAPT_EVERY, EXPECTED, NUM_EXPERTS, STEPS, Case, adapt, build, micro_batches
from tests.training.conftest import OVERRIDES
from tests.training.launching import Server, events
from tests.training.test_resume import assert_same_run, kill_after

ALL = [True] * 4


@pytest.mark.parametrize(
    ("is_active", "taken", "expected", "removed", "added"),
    [
        (ALL, [3, 1, 2, 4, 0], ALL, (), ()),
        (ALL, [3, 0, 2, 4, 0], [True, False, True, True], (1,), ()),
        # as many tokens without expert as there may be: no slot is free
        (ALL, [3, 1, 2, 4, 9], ALL, (), ()),
        ([True, False, True, False], [3, 0, 2, 0, 9], [True, True, True, False], (), (1,)),
        # a slot that has just become free counts
        (ALL, [3, 0, 0, 4, 9], [True, True, False, True], (2,), (1,)),
        # nobody took anything: one remains, the new one
        ([False, True, True, False], [0, 0, 0, 0, 9], [True, False, False, False], (1, 2), (0,)),
        # no token was seen
        ([False, True, True, False], [0, 0, 0, 0, 0], [False, True, True, False], (), ()),
    ],
)
def test_what_becomes_of_experts(
    is_active: list[bool], taken: list[int], expected: list[bool], removed: tuple[int, ...], added: tuple[int, ...]
) -> None:
    change = plan_change(is_active, taken, torch.tensor([0.0, 3.0, -4.0]))
    assert (list(change.is_active), change.removed, change.added) == (expected, removed, added)
    if added:
        torch.testing.assert_close(change.embedding_D, torch.tensor([0, 0.6, -0.8]))
    else:
        assert change.embedding_D is None


def test_no_direction_no_expert() -> None:
    change = plan_change([True, False], [3, 0, 2], torch.zeros(3))
    assert change.is_active == (True, False)
    # the last one is not dropped
    assert plan_change([True, False], [0, 0, 2], torch.zeros(3)).is_active == (True, False)


def test_where_nothing_adapts() -> None:
    model = build()
    assert ExpertAdaptation(model, is_new_stage=True).is_needed
    for _, layer in moe_layers(model):
        layer.router.requires_grad_(False)
    assert not ExpertAdaptation(model, is_new_stage=True).is_needed


def test_a_stage_starts_with_counts_of_0_and_goes_on_with_its_own() -> None:
    model = build()
    routers = [layer.router for _, layer in moe_layers(model)]
    for router in routers:
        assert isinstance(router, DynamicRouter)
        router.taken += 7
    ExpertAdaptation(model, is_new_stage=False)
    assert all(router.taken.tolist() == [7] * 5 for router in routers)
    ExpertAdaptation(model, is_new_stage=True)
    assert not any(router.taken.any() for router in routers)


def test_a_skipped_step_counts_nothing() -> None:
    model = build()
    adaptation = ExpertAdaptation(model, is_new_stage=True)
    adaptation.count(model(**micro_batches(0)[0], output_routing=True).routing)
    assert adaptation.finish_step(ADAPT_EVERY, lambda: pytest.fail("nothing changes"), has_skipped=True) is None
    for _, layer in moe_layers(model):
        assert isinstance(layer.router, DynamicRouter)
        assert not layer.router.taken.any()
        assert not layer.router.unrouted_D.any()


class Plain:
    """One process, torch's AdamW, and the adaptation spelled out."""

    def __init__(self) -> None:
        self.model = build()
        self.optimizer = torch.optim.AdamW(groups(self.model), lr=LEARNING_RATE, eps=EPS)
        self.taken: dict[str, list[int]] = {}
        self.adapted_from: list[list[int]] = []
        self.unrouted: dict[str, Tensor] = {}
        for name, layer in moe_layers(self.model):
            self._forget(name)
            layer.router.register_forward_hook(self._counting(name))

    def run(self) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], Tensor], list[list[int]]]:
        """Masters and moments after the adaptation, and at the end; and what was counted for the adaptation."""
        adapted = {}
        for step in range(STEPS):
            self.optimizer.zero_grad()
            step_loss(self.model, micro_batches(step))
            assert nn.utils.clip_grad_norm_(self.model.parameters(), CLIP) > CLIP
            self.optimizer.step()
            if step + 1 == ADAPT_EVERY:
                self._adapt()
                adapted = self._state()
        return adapted, self._state(), self.adapted_from

    def _forget(self, name: str) -> None:
        self.taken[name], self.unrouted[name] = [0] * (NUM_EXPERTS + 1), torch.zeros(32, dtype=torch.float64)

    def _counting(self, name: str) -> Callable[..., None]:
        def count(router: nn.Module, args: tuple[Any, ...], decision: Any) -> None:
            assert isinstance(router, DynamicRouter)
            x, modality = args[0].detach(), args[1].modality_T
            for token in range(len(x)):
                if modality[token] == Modality.PADDING:
                    continue
                cosines = cosine_similarity(x[token][None], router.gate.weight.detach())
                chosen = (cosines > router.gate.threshold.detach()) & router.is_active_E
                for expert in chosen.nonzero().flatten().tolist():
                    self.taken[name][expert] += 1
                if not chosen.any():
                    self.taken[name][NUM_EXPERTS] += 1
                    self.unrouted[name] += x[token]

        return count

    @torch.no_grad()
    def _adapt(self) -> None:
        for name, layer in moe_layers(self.model):
            router, taken = layer.router, self.taken[name]
            assert isinstance(router, DynamicRouter)
            changed = [e for e in range(NUM_EXPERTS) if router.is_active_E[e] and not taken[e]]
            router.is_active_E[changed] = False
            idle = [e for e in range(NUM_EXPERTS) if not router.is_active_E[e]]
            if taken[NUM_EXPERTS] and idle:
                new = idle[0]
                router.is_active_E[new] = True
                router.gate.weight[new] = self.unrouted[name] / self.unrouted[name].norm()
                router.gate.threshold[new] = 0
                changed.append(new)
            self.adapted_from.append(taken)
            for parameter in (router.gate.weight, router.gate.threshold, *layer.experts.parameters()):
                for kind in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][kind][changed] = 0
            self._forget(name)

    def _state(self) -> dict[tuple[str, str], Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found[name, "master"] = parameter.detach().clone()
                for kind in ("exp_avg", "exp_avg_sq"):
                    found[name, kind] = self.optimizer.state[parameter][kind].clone()
        for name, buffer in self.model.named_buffers():
            if name.endswith("is_active_E"):
                found[name, "weight"] = buffer.clone()
        return found


@cache
def plain() -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], Tensor], list[list[int]]]:
    return Plain().run()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], list[dict[str, Any]]]]:
    """Each rank's result of a case; a case is run once."""
    with RankServer() as ranks:

        @cache
        def run(case: Case) -> list[dict[str, Any]]:
            return ranks.run(adapt, case, world=case.world, folder=tmp_path_factory.mktemp("case"))

        yield run


def whole(results: list[dict[str, Any]], where: str | None = None) -> dict[tuple[str, str], Tensor]:
    """Logical tensors of what the ranks hold; every element is held, and the same where it is held twice."""
    found: dict[tuple[str, str], Tensor] = {}
    filled: dict[tuple[str, str], Tensor] = {}
    for result in results:
        for name, kind, shape, start, values in (result if where is None else result[where])["fragments"]:
            key = (name, kind)
            if key not in found:
                found[key] = torch.zeros(shape, dtype=values.dtype).flatten()
                filled[key] = torch.zeros(found[key].numel(), dtype=torch.bool)
            place = slice(start, start + len(values))
            assert torch.equal(found[key][place][filled[key][place]], values[filled[key][place]]), key
            found[key][place], filled[key][place] = values, True
    assert all(mask.all() for mask in filled.values())
    shapes = {(f[0], f[1]): f[2] for result in results for f in result["fragments"]}
    return {key: tensor.view(shapes[key]) for key, tensor in found.items()}


CASES = [
    Case(world=1, zero=0),
    Case(world=1, zero=2, has_checkpointing=True),
    Case(world=2, zero=1, expert_parallel_size=2),
    Case(world=2, zero=2),
    Case(world=2, zero=2, expert_parallel_size=2, has_checkpointing=True),
    Case(world=2, zero=3),
    Case(world=2, zero=3, expert_parallel_size=2),
]
BF16 = [
    Case(world=2, zero=1, precision="bf16"),
    Case(world=2, zero=2, expert_parallel_size=2, precision="bf16"),
    Case(world=2, zero=3, expert_parallel_size=2, precision="bf16"),
]


def assert_reported(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert [report is None for report in result["reports"]] == [True, False, True]
        report = result["reports"][ADAPT_EVERY - 1]
        assert {layer: {key: values[key] for key in EXPECTED[layer]} for layer, values in report.items()} == EXPECTED
        assert report == results[0]["reports"][ADAPT_EVERY - 1]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_engines_equal_the_plain_loop(case: Case, adapted: Callable[[Case], list[dict[str, Any]]]) -> None:
    results = adapted(case)
    assert_reported(results)
    *states, counts = plain()
    report = results[0]["reports"][ADAPT_EVERY - 1]
    assert [[*values["taken"], values["unrouted"]] for values in report.values()] == counts
    for found, expected in zip((whole(results, "adapted"), whole(results)), states, strict=True):
        for key, values in expected.items():
            torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*CASES[2:], *BF16], ids=str)
def test_weights_follow_their_masters_and_new_moments_are_0(
    case: Case, adapted: Callable[[Case], list[dict[str, Any]]]
) -> None:
    results = adapted(case)
    assert_reported(results)
    stored = whole(results, "adapted")
    for rank, result in enumerate(results):
        for name, weight in result["adapted"]["weights"].items():
            master = stored[name, "master"]
            if ".experts." in name:
                held = NUM_EXPERTS // case.expert_parallel_size
                start = rank % case.expert_parallel_size * held
                master = master[start : start + held]
            assert torch.equal(weight, master.to(weight.dtype)), name
    for layer, expert, is_new in ((0, 3, True), (1, 2, False), (2, 1, True)):
        prefix = f"model.language_model.layers.{layer}.mlp."
        for name, kind in stored:
            if name.startswith(prefix) and kind.startswith("exp_avg"):
                others = [one for one in range(NUM_EXPERTS) if one != expert]
                assert not stored[name, kind][expert].any(), (name, kind)
                assert stored[name, kind][others].any(), (name, kind)
        if is_new:
            assert stored[f"{prefix}router.gate.threshold", "master"][expert] == 0
            embedding = stored[f"{prefix}router.gate.weight", "master"][expert]
            torch.testing.assert_close(embedding.norm(), torch.tensor(1.0))


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [(), ("parallel.deepspeed=zero3", "train.precision=bf16")], ids=["zero2", "zero3"])
def test_a_killed_run_adapts_as_the_unbroken_one(
    settings: tuple[str, ...], server: Server, recipe: Path, tmp_path: Path
) -> None:
    """Adapted after steps 2 and 4 of the stage; killed after 3, in the middle of what is counted."""
    dynamic = "moe.router={kind: dynamic, adapt_every: 2, initial_experts: 2}"
    command = ["train", str(recipe), *OVERRIDES, dynamic, *settings]
    server.run([*command, f"output_dir={tmp_path / 'unbroken'}"])
    adapted = events(tmp_path / "unbroken").named("experts")
    assert [line["step"] for line in adapted] == [2, 4]
    assert {layer: values["added"] for layer, values in adapted[0]["layers"].items()} == {"0": [2], "2": [2]}

    broken = [*command, f"output_dir={tmp_path / 'broken'}"]
    kill_after(server, broken, tmp_path / "broken", "sparse", 3)
    server.run(broken)
    assert events(tmp_path / "broken").named("resume")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    assert events(tmp_path / "broken").named("experts")[-1]["layers"] == adapted[-1]["layers"]
