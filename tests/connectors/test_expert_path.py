"""The search by itself: widths, selection, ties, and the way back, beside plain lists of paths."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lvlm.connectors.expert_path import Selection, beam_widths, select_paths, trace_back


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "num_paths", "widths"),
    [
        (6, 3, 3, (3, 3, 3, 3, 3, 1)),
        (6, 7, 3, (7, 3, 3, 3, 3, 1)),  # the first layer keeps all
        (4, 2, 3, (2, 3, 3, 1)),  # 2 x 2 candidates at the second
        (4, 2, 100, (2, 4, 8, 1)),
        (3, 4, 1, (4, 1, 1)),
        (2, 3, 3, (3, 1)),
        (1, 3, 3, (1,)),  # the first is the top
        (3, 1, 3, (1, 1, 1)),
    ],
)
def test_widths(num_layers: int, num_experts: int, num_paths: int, widths: tuple[int, ...]) -> None:
    assert beam_widths(num_layers, num_experts, num_paths=num_paths, selection="path") == widths
    assert beam_widths(num_layers, num_experts, num_paths=num_paths, selection="greedy") == (1,) * num_layers


def test_selection_by_hand() -> None:
    """Sample 0: of (-1 + -2, -1 + -3), (-2 + -0.5, -2 + -9) the best are -2.5 and -3."""
    score_NP = torch.tensor([[-1.0, -2], [-1, -1]], dtype=torch.float64)
    log_gate_NPE = torch.tensor([[[-2.0, -3], [-0.5, -9]], [[-4, -1], [-3, -2]]])
    selection = select_paths(score_NP, log_gate_NPE, num_kept=2)
    assert selection.path_NK.tolist() == [[1, 0], [0, 1]]
    assert selection.expert_NK.tolist() == [[0, 0], [1, 1]]
    assert selection.score_NK.tolist() == [[-2.5, -3], [-2, -3]]


def test_ties_go_to_the_better_path_and_the_lowest_expert() -> None:
    score_NP = torch.zeros(1, 3, dtype=torch.float64)
    selection = select_paths(score_NP, torch.zeros(1, 3, 4), num_kept=6)
    assert selection.path_NK.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert selection.expert_NK.tolist() == [[0, 1, 2, 3, 0, 1]]


def test_ties_among_many() -> None:
    """A sort that is not stable, or topk, mixes equal ones from some number on. Every third candidate is better."""
    log_gate_NPE = -torch.ones(1, 20, 10)
    log_gate_NPE.view(-1)[::3] = -0.5
    selection = select_paths(torch.zeros(1, 20, dtype=torch.float64), log_gate_NPE, num_kept=100)
    expected = [*range(0, 200, 3), *(i for i in range(200) if i % 3)][:100]
    assert (selection.path_NK * 10 + selection.expert_NK).tolist() == [expected]


def test_scores_carry_no_gradient() -> None:
    score_NP = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    log_gate_NPE = torch.randn(2, 1, 3, requires_grad=True)
    assert not select_paths(score_NP, log_gate_NPE, num_kept=2).score_NK.requires_grad


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_the_search_equals_lists_of_paths(
    seed: int, num_layers: int, num_experts: int, num_paths: int, is_coarse: bool
) -> None:
    """Gates that depend on the layer and the whole path so far. Coarse ones tie often."""
    draw = random.Random(seed)
    tables: list[dict[tuple[int, ...], float]] = [{} for _ in range(3)]

    def log_gate(sample: int, path: tuple[int, ...]) -> float:
        number = -draw.randint(1, 3) / 2 if is_coarse else -draw.random()
        return tables[sample].setdefault(path, number)

    widths = beam_widths(num_layers, num_experts, num_paths=num_paths, selection="path")
    beams: list[list[tuple[int, ...]]] = [[()] for _ in range(3)]
    scores: list[list[float]] = [[0.0] for _ in range(3)]
    score_NP = torch.zeros(3, 1, dtype=torch.float64)
    selections: list[Selection] = []
    for width in widths:
        gates = [[[log_gate(n, (*path, e)) for e in range(num_experts)] for path in beams[n]] for n in range(3)]
        selection = select_paths(score_NP, torch.tensor(gates, dtype=torch.float64), num_kept=width)
        for n in range(3):
            candidates = [
                (score + gates[n][p][e], (*path, e))
                for p, (path, score) in enumerate(zip(beams[n], scores[n], strict=True))
                for e in range(num_experts)
            ]
            candidates.sort(key=lambda candidate: -candidate[0])  # stable
            beams[n] = [path for _, path in candidates[:width]]
            scores[n] = [score for score, _ in candidates[:width]]
        assert selection.score_NK.tolist() == scores
        selections.append(selection)
        score_NP = selection.score_NK

    steps = trace_back(selections)
    found = torch.stack([step.expert_N for step in steps], dim=1)
    assert [tuple(path) for path in found.tolist()] == [beam[0] for beam in beams]
    for depth, (step, selection) in enumerate(zip(steps, selections, strict=True)):
        rows = torch.arange(3)
        assert torch.equal(selection.path_NK[rows, step.kept_N], step.path_N)
        assert torch.equal(selection.expert_NK[rows, step.kept_N], step.expert_N)
        if depth:
            assert torch.equal(steps[depth - 1].kept_N, step.path_N)
