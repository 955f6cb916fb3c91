"""Routers and their losses beside loops over plain Python numbers (float64), written from the equations.

Random small batches: padding anywhere, text-only rows, several images a row, images of one token, modalities that are
absent. Where the loops see a tie (a score, or a variance against its mean, closer than float32 can tell) the package
may decide either way, and that place is not compared.
"""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch

from moe_lvlm.config.moe import BalanceSettings, MoEConfig
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.capacity import drop_over_capacity, expert_capacity
from moe_lvlm.routing.losses import auxiliary_loss, balance_loss, balanced_tokens
from moe_lvlm.routing.ltdr import instruction_tokens, vision_tail
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.task import task_loss
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision, Site

SEEDS = range(50)
PAD, LANGUAGE, VISION = (int(kind) for kind in (Modality.PADDING, Modality.LANGUAGE, Modality.VISION))
NAMES = {"language": LANGUAGE, "vision": VISION}
WIDTH = 5
CLOSE = 1e-6

Matrix = list[list[float]]
every_seed = pytest.mark.parametrize("seed", SEEDS)


class Case(NamedTuple):
    """A batch as plain lists, a row a token, and the same as the package takes it."""

    modality: list[int]
    image: list[int]
    sample: list[int]
    task: list[int]
    attention: list[float]
    x: Matrix
    context: RoutingContext
    x_TD: torch.Tensor


def make_case(seed: int) -> Case:
    draw = random.Random(seed)
    rows, columns = draw.randint(1, 4), draw.randint(1, 12)
    kinds = draw.choice(
        [(PAD, LANGUAGE, VISION), (LANGUAGE, VISION), (PAD, LANGUAGE), (VISION,), (PAD, VISION, VISION)]
    )
    modality, image, sample = [], [], []
    num_images = 0
    for row in range(rows):
        before = PAD
        for _ in range(columns):
            kind = draw.choice(kinds)
            # a run of vision tokens is an image, now and then cut into two
            if kind == VISION and (before != VISION or draw.random() < 0.2):
                num_images += 1
            before = kind
            modality.append(kind)
            image.append(num_images - 1 if kind == VISION else -1)
            sample.append(-1 if kind == PAD else row)
    task = [draw.choice([-1, 0, 1]) for _ in range(rows)]
    # few values, so that equal attention is common
    attention = [draw.choice([0.0, 0.25, 0.5, 0.75]) for _ in modality]
    x_TD = torch.tensor([[draw.gauss(0, 2) for _ in range(WIDTH)] for _ in modality])
    context = RoutingContext(
        modality_BS=torch.tensor(modality, dtype=torch.int8).view(rows, columns),
        image_BS=torch.tensor(image, dtype=torch.int32).view(rows, columns),
        sample_BS=torch.tensor(sample, dtype=torch.int32).view(rows, columns),
        num_samples=rows,
        task_N=torch.tensor(task),
        attention_BS=torch.tensor(attention).view(rows, columns),
    )
    return Case(modality, image, sample, task, attention, x_TD.double().tolist(), context, x_TD)


def make_config(seed: int, **settings: Any) -> MoEConfig:
    """Settings drawn from the seed, but for those that are given."""
    draw = random.Random(1000 + seed)
    num_experts = draw.randint(2, 6)
    top_k = draw.randint(1, min(3, num_experts))
    return MoEConfig.model_validate({"num_experts": num_experts, "top_k": top_k} | settings)


def make_router(config: MoEConfig, seed: int) -> tuple[Router, Matrix]:
    """A router in training, and its gate as lists."""
    torch.manual_seed(seed)
    router = build_router(model_width=WIDTH, config=config).train()
    weight = router.get_parameter("gate.weight")
    with torch.no_grad():
        weight.normal_()
    return router, weight.detach().double().tolist()


# The equations, in loops


def score(x: Matrix, gate: Matrix) -> Matrix:
    return [[sum(a * b for a, b in zip(token, row, strict=True)) for row in gate] for token in x]


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(value - max(scores)) for value in scores]
    return [power / sum(powers) for power in powers]


def ranked(probs: list[float]) -> list[int]:
    """Experts, best first; of equal ones the lowest."""
    return sorted(range(len(probs)), key=lambda expert: (-probs[expert], expert))


def is_tied(probs: list[float]) -> bool:
    best = sorted(probs)
    return any(b - a < CLOSE for a, b in itertools.pairwise(best))


def variance(probs: list[float]) -> float:
    """Eq. 9."""
    mean = sum(probs) / len(probs)
    return sum((p - mean) ** 2 for p in probs) / len(probs)


def tail(probs: Matrix, case: Case, *, scope: str, elsewhere: list[float] | None = None) -> list[bool | None]:
    """Eq. 11; None where it is too close to tell. elsewhere: variances of the other ranks' vision tokens."""
    found: list[bool | None] = []
    for token, kind in enumerate(case.modality):
        if kind != VISION:
            found.append(False)
            continue
        compared = [
            variance(probs[other])
            for other, other_kind in enumerate(case.modality)
            if other_kind == VISION and (scope != "image" or case.image[other] == case.image[token])
        ]
        compared += elsewhere or []
        if len(compared) == 1:
            found.append(False)  # it is its own mean
            continue
        excess = variance(probs[token]) - sum(compared) / len(compared)
        found.append(None if abs(excess) < CLOSE else excess > 0)
    return found


def balance(probs: Matrix, chosen: list[list[int]], tokens: list[int], *, fraction: str, experts: list[int]) -> float:
    """Eq. 8 and 10 over some tokens and the experts that they may choose. chosen: experts of each token, best first."""
    if not tokens:
        return 0.0
    picks = [expert for token in tokens for expert in (chosen[token][:1] if fraction == "top1" else chosen[token])]
    return len(experts) * sum(
        picks.count(expert) / len(picks) * sum(probs[token][expert] for token in tokens) / len(tokens)
        for expert in experts
    )


def chosen_of(decision: RoutingDecision) -> list[list[int]]:
    return [
        [expert for expert, is_kept in zip(ids, keep, strict=True) if is_kept]
        for ids, keep in zip(decision.expert_ids_RK.tolist(), decision.keep_RK.tolist(), strict=True)
    ]


def queue(ids: list[list[int]], chosen: list[list[bool]], capacity: int) -> list[list[bool]]:
    """All first choices by position, then all second ones, and so on, while there is room."""
    room: dict[int, int] = {}
    keep = [[False] * len(row) for row in ids]
    for slot in range(len(ids[0])):
        for token, row in enumerate(ids):
            expert = row[slot]
            if chosen[token][slot] and room.setdefault(expert, capacity) > 0:
                room[expert] -= 1
                keep[token][slot] = True
    return keep


# Beside the package


@every_seed
@pytest.mark.parametrize("fraction", ["top1", "all_choices"])
def test_balance_loss(seed: int, fraction: str) -> None:
    case, config = make_case(seed), make_config(seed, router={"kind": "ltdr"})
    router, _ = make_router(config, seed)
    decision = router(case.x_TD, case.context)
    probs = decision.probs_RE.double().tolist()
    experts = list(range(config.num_experts))
    for on in ((), ("language",), ("vision",), ("language", "vision")):
        tokens = [token for token, kind in enumerate(case.modality) if kind in [NAMES[name] for name in on]]
        expected = balance(probs, chosen_of(decision), tokens, fraction=fraction, experts=experts)
        is_balanced_T = balanced_tokens(case.context, on)
        assert is_balanced_T.nonzero().flatten().tolist() == tokens
        assert balance_loss(decision, is_balanced_T, fraction=fraction).item() == pytest.approx(expected, rel=1e-5)


@every_seed
def test_auxiliary_loss_sums_layers(seed: int) -> None:
    case = make_case(seed)
    config = make_config(seed, router={"kind": "ltdr"}, balance={"coefficient": 0.3, "on": ["language"]})
    trace, expected = RoutingTrace(case.context), 0.0
    tokens = [token for token, kind in enumerate(case.modality) if kind == LANGUAGE]
    for layer in range(3):
        router, _ = make_router(config, seed + 100 * layer)
        decision = router(case.x_TD, case.context)
        trace.record(Site("language_model", layer), decision)
        probs = decision.probs_RE.double().tolist()
        experts = list(range(config.num_experts))
        expected += 0.3 * balance(probs, chosen_of(decision), tokens, fraction="top1", experts=experts)
    loss = auxiliary_loss(trace, config)
    assert loss is not None
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@every_seed
@pytest.mark.parametrize("scope", ["batch", "image", "global"])
def test_tail(seed: int, scope: str) -> None:
    case, other = make_case(seed), make_case(seed + 500)
    router, gate = make_router(make_config(seed, router={"kind": "ltdr"}), seed)
    probs, other_probs = ([softmax(row) for row in score(one.x, gate)] for one in (case, other))
    elsewhere = [variance(row) for row, kind in zip(other_probs, other.modality, strict=True) if kind == VISION]

    def add_other_rank(totals_2: torch.Tensor) -> torch.Tensor:
        return totals_2 + totals_2.new_tensor([sum(elsewhere), len(elsewhere)])

    expected = tail(probs, case, scope=scope, elsewhere=elsewhere if scope == "global" else None)
    probs_TE = router(case.x_TD, case.context).probs_RE
    found = vision_tail(probs_TE, case.context, scope=scope, sum_over_ranks=add_other_rank).tolist()
    assert [f for f, e in zip(found, expected, strict=True) if e is not None] == [e for e in expected if e is not None]


@every_seed
@pytest.mark.parametrize("select", ["vision_tail", "vision_head", "instruction_aware", "none"])
@pytest.mark.parametrize(
    "weights",
    [
        {"renormalize": True},
        {"renormalize": True, "top1_weight": "probability"},
        {"renormalize": False},
    ],
    ids=["renormalised", "raw_top1", "literal"],
)
def test_eea(seed: int, select: str, weights: dict[str, Any]) -> None:
    """Which experts a token takes, and eq. 12's weights, literal and renormalised."""
    case = make_case(seed)
    plain = make_config(seed)
    tail_k = random.Random(seed).choice([None, plain.top_k, plain.num_experts])
    scope = random.Random(seed).choice(["batch", "image"])
    settings = {"kind": "ltdr", "eea_select": select, "tail_k": tail_k, "tail_scope": scope}
    router, gate = make_router(make_config(seed, router=settings | weights), seed)
    decision = router(case.x_TD, case.context)
    probs = [softmax(row) for row in score(case.x, gate)]
    is_tail = tail(probs, case, scope=scope)
    most_looked_at = attended(case, share=Fraction(15, 100))
    for token, kind in enumerate(case.modality):
        is_chosen = {
            "vision_tail": is_tail[token],
            "vision_head": None if is_tail[token] is None else kind == VISION and not is_tail[token],
            "instruction_aware": token in most_looked_at,
            "none": False,
        }[select]
        if is_chosen is None or is_tied(probs[token]):
            continue
        count = (tail_k or plain.num_experts) if is_chosen else plain.top_k
        experts = ranked(probs[token])[: count if kind != PAD else 0]
        total = sum(probs[token][expert] for expert in experts)
        expected = [probs[token][expert] for expert in experts]
        if weights["renormalize"] and not (len(experts) == 1 and weights.get("top1_weight") == "probability"):
            expected = [value / total for value in expected]
        assert chosen_of(decision)[token] == experts
        padded = expected + [0.0] * (decision.weights_RK.shape[1] - len(expected))
        assert decision.weights_RK[token].tolist() == pytest.approx(padded, rel=1e-4, abs=1e-7)


def attended(case: Case, *, share: Fraction) -> set[int]:
    """Of each image with M tokens the ceil(share x M) that are attended to most; of equal ones the first."""
    found: set[int] = set()
    for image in set(case.image) - {-1}:
        tokens = [token for token, owner in enumerate(case.image) if owner == image]
        tokens.sort(key=lambda token: (-case.attention[token], token))
        found |= set(tokens[: math.ceil(share * len(tokens))])
    return found


@every_seed
def test_instruction_aware_tokens(seed: int) -> None:
    case = make_case(seed)
    for share in ("0.15", "0.3", "0.5", "1"):
        found = instruction_tokens(case.context, share=float(share))
        assert set(found.nonzero().flatten().tolist()) == attended(case, share=Fraction(share))


@pytest.mark.parametrize("percent", [15, 7, 55])  # in floating point .07 x 100 is above 7, .55 x 100 above 55
def test_share_of_an_image_of_any_size(percent: int) -> None:
    for num_tokens in [*range(1, 101), 256, 576, 2880]:  # 576 is CLIP's at 336 pixels
        context = RoutingContext(
            modality_BS=torch.full((1, num_tokens), VISION, dtype=torch.int8),
            image_BS=torch.zeros(1, num_tokens, dtype=torch.int32),
            sample_BS=torch.zeros(1, num_tokens, dtype=torch.int32),
            attention_BS=torch.rand(1, num_tokens),
        )
        expected = -(-percent * num_tokens // 100)
        assert instruction_tokens(context, share=percent / 100).sum().item() == expected


@every_seed
def test_queue_at_the_experts(seed: int) -> None:
    draw = random.Random(seed)
    num_experts, num_tokens = draw.randint(1, 5), draw.randint(1, 20)
    num_slots = draw.randint(1, num_experts)
    ids = [draw.sample(range(num_experts), num_slots) for _ in range(num_tokens)]
    # a token uses its first so many slots; padding none
    counts = [draw.randint(0, num_slots) for _ in range(num_tokens)]
    chosen = [[slot < count for slot in range(num_slots)] for count in counts]
    capacity = draw.randint(1, num_tokens + 1)
    found = drop_over_capacity(torch.tensor(ids), torch.tensor(chosen), num_experts=num_experts, capacity=capacity)
    assert found.tolist() == queue(ids, chosen, capacity)


@pytest.mark.parametrize("factor", ["0.5", "1", "1.1", "1.25", "1.3", "1.5", "2"])
def test_capacity_rounds_up(factor: str) -> None:
    for top_k, num_experts, num_positions in itertools.product((1, 2, 3), (2, 3, 4, 6, 8), range(1, 200)):
        expected = math.ceil(top_k * Fraction(factor) * num_positions / num_experts)
        assert expert_capacity(num_positions, num_experts, top_k=top_k, factor=float(factor)) == expected


@every_seed
@pytest.mark.parametrize("kind", ["top_k", "ltdr"])
@pytest.mark.parametrize("training", [True, False])
def test_dropping(seed: int, kind: str, training: bool) -> None:
    """Who is dropped when experts are full, padding counting in their size, and the weights of who is kept."""
    case = make_case(seed)
    factors = {"capacity_factor": 0.5, "eval_capacity_factor": 1.25}
    config = make_config(seed, router={"kind": kind}, **factors)
    router, _ = make_router(config, seed)
    without, _ = make_router(make_config(seed, router={"kind": kind}), seed)
    decision = router.train(training)(case.x_TD, case.context)
    dropless = without.train(training)(case.x_TD, case.context)
    factor = Fraction(1, 2) if training else Fraction(5, 4)
    capacity = math.ceil(config.top_k * factor * len(case.modality) / config.num_experts)

    ids, chosen = dropless.expert_ids_RK.tolist(), dropless.keep_RK.tolist()
    keep = queue(ids, chosen, capacity)
    assert decision.expert_ids_RK.tolist() == ids
    assert decision.keep_RK.tolist() == keep
    assert decision.dropped_RK is not None
    dropped = [
        [was and not is_kept for was, is_kept in zip(*rows, strict=True)] for rows in zip(chosen, keep, strict=True)
    ]
    assert decision.dropped_RK.tolist() == dropped
    probs = decision.probs_RE.double().tolist()
    for token, kept in enumerate(keep):
        raw = [probs[token][expert] * is_kept for expert, is_kept in zip(ids[token], kept, strict=True)]
        expected = [value / sum(raw) if any(kept) else 0.0 for value in raw]
        assert decision.weights_RK[token].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@every_seed
@pytest.mark.parametrize("fraction", ["top1", "all_choices"])
def test_dropped_assignments_count_for_the_balance(seed: int, fraction: str) -> None:
    case = make_case(seed)
    on = {"balance": {"coefficient": 1.0, "fraction": fraction}}
    config = make_config(seed, capacity_factor=0.5, **on)
    router, _ = make_router(config, seed)
    without, _ = make_router(make_config(seed, **on), seed)
    decision, dropless = (one(case.x_TD, case.context) for one in (router, without))
    trace = RoutingTrace(case.context)
    trace.record(Site("language_model", 0), decision)
    loss = auxiliary_loss(trace, config)
    tokens = [token for token, kind in enumerate(case.modality) if kind != PAD]
    expected = balance(
        decision.probs_RE.double().tolist(), chosen_of(dropless), tokens,
        fraction=fraction, experts=list(range(config.num_experts)),
    )  # fmt: skip
    assert loss is not None
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@every_seed
def test_modality_groups(seed: int) -> None:
    """Softmax, choice and loss within a modality's own experts (table 11)."""
    draw = random.Random(seed)
    fraction = draw.choice(["top1", "all_choices"])
    on = draw.choice([("language",), ("vision",), ("language", "vision")])
    vision_experts, language_experts = draw.randint(1, 4), draw.randint(1, 4)
    top_k = draw.randint(1, min(vision_experts, language_experts))
    num_experts = vision_experts + language_experts
    config = MoEConfig.model_validate(
        {
            "num_experts": num_experts,
            "top_k": top_k,
            "router": {"kind": "modality_groups", "vision_experts": vision_experts},
            "balance": BalanceSettings.model_validate({"coefficient": 0.5, "on": on, "fraction": fraction}),
        }
    )
    case = make_case(seed)
    router, gate = make_router(config, seed)
    decision = router(case.x_TD, case.context)
    groups = {VISION: list(range(vision_experts)), LANGUAGE: list(range(vision_experts, num_experts))}
    scores = score(case.x, gate)
    probs: Matrix = []
    for token, kind in enumerate(case.modality):
        group = groups.get(kind, [])
        within = softmax([scores[token][expert] for expert in group]) if group else []
        probs.append([0.0] * num_experts)
        for expert, value in zip(group, within, strict=True):
            probs[token][expert] = value
        if kind == PAD:
            assert not decision.keep_RK[token].any()
            continue
        assert decision.probs_RE[token].tolist() == pytest.approx(probs[token], abs=1e-5)
        if not is_tied(within):
            assert chosen_of(decision)[token] == [group[place] for place in ranked(within)[:top_k]]

    trace = RoutingTrace(case.context)
    trace.record(Site("language_model", 0), decision)
    loss = auxiliary_loss(trace, config)
    expected = sum(
        balance(
            probs, chosen_of(decision), [token for token, kind in enumerate(case.modality) if kind == NAMES[name]],
            fraction=fraction, experts=groups[NAMES[name]],
        )
        for name in on
    )  # fmt: skip
    assert loss is not None
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-4)


@every_seed
def test_task_cross_entropy(seed: int) -> None:
    """-log of the probability of the task's own expert, mean over the tokens of samples with a task."""
    case = make_case(seed)
    config = make_config(seed, router={"kind": "task", "coefficient": 0.25}, balance={"coefficient": 0.0})
    router, gate = make_router(config, seed)
    decision = router(case.x_TD, case.context)
    losses = [
        -math.log(softmax(scores)[case.task[owner]])
        for scores, owner in zip(score(case.x, gate), case.sample, strict=True)
        if owner >= 0 and case.task[owner] >= 0
    ]
    expected = sum(losses) / len(losses) if losses else 0.0
    assert task_loss(decision, case.context).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    trace = RoutingTrace(case.context)
    trace.record(Site("language_model", 0), decision)
    loss = auxiliary_loss(trace, config)
    assert loss is not None
    assert loss.item() == pytest.approx(0.25 * expected, rel=1e-4, abs=1e-6)
