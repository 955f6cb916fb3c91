"""LoRA experts by dataset and cluster, against counts and means worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from moe_lvlm.analysis.adapter_section import normalised_information
from moe_lvlm.analysis.adapters import AdapterStatistics, linear_name
from moe_lvlm.analysis.measures import LoadCounter, tail_by_site
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.config.moe import BalanceSettings, MoEConfig
from moe_lvlm.routing.losses import auxiliary_loss
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, RoutingDecision, Site
from tests.analysis.traces import adapter_trace, connector_trace

# Five samples of two tasks and three clusters: (expert, gate) at q_proj and at v_proj. Gates are sums of powers of two.
NAMES = ("vqa", "cap", "vqa", "vqa", "cap")
CLUSTERS = (0, 2, 0, 1, 2)
CHOICES = (
    ((0, 0.5), (2, 0.75)),
    ((1, 0.75), (2, 1.0)),
    ((0, 0.5), (1, 0.5)),
    ((2, 1.0), (1, 0.5)),
    ((1, 0.25), (0, 1.0)),
)
Q, V = Site("adapter.self_attn.q_proj", 0), Site("adapter.self_attn.v_proj", 0)


def counted() -> AdapterStatistics:
    statistics = AdapterStatistics("cluster", True)
    statistics.update(adapter_trace(CHOICES[:2], clusters=CLUSTERS[:2]), NAMES[:2])
    statistics.update(adapter_trace(CHOICES[2:], clusters=CLUSTERS[2:]), NAMES[2:])
    return statistics


def test_samples_are_counted_by_task_linear_and_expert() -> None:
    statistics = counted()
    assert (len(statistics), statistics.num_experts, statistics.linears) == (5, 3, (Q, V))
    vqa, cap = statistics.subsets["vqa"], statistics.subsets["cap"]
    assert (vqa.samples, cap.samples) == (3, 2)
    assert vqa.clusters == {0: 2, 1: 1}
    assert cap.clusters == {2: 2}
    assert vqa.experts_LE.tolist() == [[2, 0, 1], [0, 2, 1]]
    assert cap.experts_LE.tolist() == [[0, 2, 0], [1, 0, 1]]
    assert statistics.experts_by_subset(1).tolist() == [[0, 2, 1], [1, 0, 1]]
    assert statistics.clusters_by_subset().tolist() == [[2, 1, 0], [0, 0, 2]]
    assert {cluster: counts.tolist() for cluster, counts in statistics.by_cluster.items()} == {
        0: [[2, 0, 0], [0, 1, 1]],
        1: [[0, 0, 1], [0, 1, 0]],
        2: [[0, 2, 0], [1, 0, 1]],
    }


def test_gates_have_a_mean_and_a_deviation() -> None:
    vqa = counted().subsets["vqa"]
    gates = [[0.5, 0.5, 1.0], [0.75, 0.5, 0.5]]
    assert vqa.gate_L.tolist() == pytest.approx([np.mean(row) for row in gates])
    mean, deviation = vqa.gate
    assert mean == pytest.approx(np.mean(gates))
    assert deviation == pytest.approx(np.std(gates))
    assert vqa.expert_shares_LE.tolist() == [pytest.approx([2 / 3, 0, 1 / 3]), pytest.approx([0, 2 / 3, 1 / 3])]


def test_gates_by_dataset_are_counted_by_dataset() -> None:
    statistics = AdapterStatistics("dataset", False)
    statistics.update(adapter_trace(CHOICES, clusters=CLUSTERS, datasets=(5, 7, 5, 5, 7)), NAMES)
    assert statistics.subsets["vqa"].clusters == {5: 3}
    assert sorted(statistics.by_cluster) == [5, 7]


def test_samples_without_a_cluster_are_in_none() -> None:
    statistics = AdapterStatistics("sentence", False)
    statistics.update(adapter_trace(CHOICES), NAMES)
    assert statistics.subsets["vqa"].clusters == {}
    assert statistics.by_cluster == {}
    assert statistics.clusters_by_subset().shape == (2, 0)
    assert statistics.subsets["vqa"].experts_LE.tolist() == counted().subsets["vqa"].experts_LE.tolist()


def test_tokens_are_counted_with_their_sample_whatever_row_they_stand_in() -> None:
    # two samples packed into one row, and a padding that decides for expert 1 and is not kept
    context = RoutingContext(
        modality_BS=torch.tensor([[1, 1, 1, 1, 0]], dtype=torch.int8),
        image_BS=torch.full((1, 5), -1, dtype=torch.int32),
        sample_BS=torch.tensor([[0, 0, 1, 0, -1]], dtype=torch.int32),
        num_samples=2,
    )
    # fmt: off
    ids_TK = torch.tensor([[0, 1], [0, 2], [2, 0], [1, 0], [1, 2]])
    weights_TK = torch.tensor([[0.75, 0.25], [0.5, 0.25], [0.5, 0.5], [0.75, 0.0], [0.0, 0.0]])
    # fmt: on
    keep_TK = torch.tensor([[True, True]] * 4 + [[False, False]])
    trace = RoutingTrace(context)
    decision = RoutingDecision(torch.zeros(5, 3), torch.full((5, 3), 1 / 3), ids_TK, weights_TK, keep_TK, "token")
    trace.record(Q, decision)
    statistics = AdapterStatistics("token", False)
    statistics.update(trace, ["a", "b"])
    a, b = statistics.subsets["a"], statistics.subsets["b"]
    assert (a.samples, a.rows_L.tolist(), a.experts_LE.tolist()) == (1, [3], [[3, 2, 1]])
    assert (b.samples, b.rows_L.tolist(), b.experts_LE.tolist()) == (1, [1], [[1, 0, 1]])
    assert a.gate[0] == pytest.approx((0.75 + 0.5 + 0.75) / 3)


def test_parts_of_an_evaluation_add_up() -> None:
    whole, part, rest = counted(), AdapterStatistics("cluster", True), AdapterStatistics("cluster", True)
    part.update(adapter_trace(CHOICES[:3], clusters=CLUSTERS[:3]), NAMES[:3])
    rest.update(adapter_trace(CHOICES[3:], clusters=CLUSTERS[3:]), NAMES[3:])
    total = AdapterStatistics("cluster", True)
    for one in (part, AdapterStatistics("cluster", True), rest):
        total.merge(one)
    assert_equal(total, whole)
    assert part.subsets["vqa"].experts_LE.tolist() == [[2, 0, 0], [0, 1, 1]]  # what was added is left alone


def test_a_batch_without_adapters_or_without_samples_adds_nothing(hand_trace: RoutingTrace) -> None:
    statistics = counted()
    statistics.update(hand_trace, ["a", "b"])
    statistics.update(connector_trace([(0, 0, 0)]), ["a"])
    empty = RoutingTrace(
        RoutingContext(
            modality_BS=torch.zeros(1, 2, dtype=torch.int8),
            image_BS=torch.full((1, 2), -1, dtype=torch.int32),
            sample_BS=torch.full((1, 2), -1, dtype=torch.int32),
            num_samples=0,
        )
    )
    for site, decision in adapter_trace(CHOICES[:1]).items():
        empty.record(site, decision._replace(keep_RK=torch.zeros(1, 1).bool()))
    statistics.update(empty, [])
    assert_equal(statistics, counted())


def test_round_trip(tmp_path: Path) -> None:
    counted().save(tmp_path / "adapters.json")
    assert_equal(AdapterStatistics.load(tmp_path / "adapters.json"), counted())
    AdapterStatistics("token", False).save(tmp_path / "empty.json")
    assert len(AdapterStatistics.load(tmp_path / "empty.json")) == 0


GOOD: dict[str, Any] = {
    "format": 1,
    "gating": "cluster",
    "has_universal": True,
    "num_experts": 2,
    "linears": [["adapter.q_proj", 0]],
    "subsets": {
        "a": {
            "samples": 2,
            "clusters": {"4": 2},
            "experts": [[1, 1]],
            "rows": [2],
            "gate_sum": [1.5],
            "gate_square_sum": [1.2],
        }
    },
    "clusters": {"4": [[1, 1]]},
}


def subset(**changes: Any) -> dict[str, Any]:
    return {"subsets": {"a": GOOD["subsets"]["a"] | changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "adapter statistics of format 0; allowed: 1"),
        ({"more": 1}, "more; allowed: exactly format, gating"),
        ({"gating": "mood"}, "gating 'mood'"),
        ({"has_universal": 1}, "has_universal 1; allowed"),
        ({"linears": [["q_proj", 0]]}, "allowed: a name from `adapter.` on"),
        ({"linears": [["adapter.q_proj", "x"]]}, "allowed: a name from `adapter.` on, and a layer"),
        ({"linears": 3}, "linears: 3; allowed: a list"),
        ({"num_experts": 3}, "allowed: 1 rows, one a linear, of 3 experts"),
        ({"subsets": []}, r"subsets: \[\]; allowed: an object"),
        (subset(more=1), "subset 'a': allowed: exactly samples"),
        (subset(clusters={"04": 2}), "cluster '04'; allowed: a whole number"),
        (subset(clusters={"4": 3}), "3 samples with a cluster; allowed: 2"),
        (subset(samples=0), "allowed: whole numbers from 1"),
        (subset(rows=[2, 2]), "rows and gates; allowed: 1 numbers each"),
        (subset(gate_sum=["x"]), r"\['x'\]; allowed: numbers from 0"),
        (subset(experts=[[1, -1]]), "allowed: whole numbers from 0"),
        ({"clusters": {"4": [[1]]}}, "cluster 4: counts of experts; allowed: 1 rows"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "adapters.json"
    path.write_text(json.dumps(GOOD))
    assert AdapterStatistics.load(path).subsets["a"].clusters == {4: 2}
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=message) as error:
        AdapterStatistics.load(path)
    assert str(path) in str(error.value)


def test_what_does_not_fit_is_refused() -> None:
    statistics = counted()
    with pytest.raises(ValueError, match="names: 1; allowed: 2, one a sample"):
        statistics.update(adapter_trace(CHOICES[:2]), ["a"])
    with pytest.raises(ValueError, match="1 linears of 3 experts; allowed: the 2 of 3 experts"):
        statistics.update(adapter_trace([((0, 0.5),)], linears=[("self_attn.q_proj", 0)]), ["a"])
    with pytest.raises(ValueError, match="2 linears of 4 experts; allowed"):
        statistics.update(adapter_trace(CHOICES[:1], num_experts=4), ["a"])
    with pytest.raises(ValueError, match=r"gating and has_universal: \('token', True\); allowed: \('cluster', True\)"):
        statistics.merge(AdapterStatistics("token", True))
    of_images = RoutingTrace(connector_trace([(0, 0, 0)]).context)
    for _, decision in connector_trace([(0, 0, 0)], layers=(2,)).items():
        of_images.record(Q, decision)
    with pytest.raises(ValueError, match=r"q_proj.*decides about images"):
        AdapterStatistics("cluster", True).update(of_images, ["a"])
    assert_equal(statistics, counted())


def test_adapters_are_no_moe_layers_of_the_language_model(hand_trace: RoutingTrace) -> None:
    config = MoEConfig(num_experts=4, balance=BalanceSettings(coefficient=1.0, on=("language", "vision")))
    alone = RoutingStatistics()
    alone.update(hand_trace)
    loss, tail = auxiliary_loss(hand_trace, config), tail_by_site(hand_trace, 1)
    counter = LoadCounter()
    counter.update(hand_trace)
    of_layer = counter.summary()
    for site, decision in adapter_trace(CHOICES[:2]).items():
        hand_trace.record(site, decision)

    beside = RoutingStatistics()
    beside.update(hand_trace)
    assert [site for site, _ in beside.items()] == [Site("language_model", 2)]
    assert beside[Site("language_model", 2)].load.tolist() == alone[Site("language_model", 2)].load.tolist()
    assert loss is not None
    assert loss > 0  # else nothing could be added to it
    assert auxiliary_loss(hand_trace, config) == loss
    assert list(tail_by_site(hand_trace, 1)) == list(tail)
    counter = LoadCounter()
    counter.update(hand_trace)
    summary = counter.summary()
    assert summary["tail_share"] == of_layer["tail_share"]
    # sample 0 has 1 word and 3 visual tokens, sample 1 has 2 of each: all of them count for their sample's expert
    assert summary["expert_load"] == {
        **(of_layer["expert_load"] or {}),
        "adapter.self_attn.q_proj.0": {"language": [1, 2, 0], "vision": [3, 2, 0]},
        "adapter.self_attn.v_proj.0": {"language": [0, 0, 3], "vision": [0, 0, 5]},
    }
    only = RoutingStatistics()
    only.update(adapter_trace(CHOICES[:2]))
    assert len(only) == 0
    assert auxiliary_loss(adapter_trace(CHOICES[:2]), config) is None


def test_name_of_a_linear() -> None:
    assert linear_name(Site("adapter.mlp.up_proj", 3)) == "mlp.up_proj"


def test_normalised_information_is_scikit_learn_s() -> None:
    random = np.random.default_rng(0)
    for _ in range(4):
        table = random.integers(0, 5, (3, 4))
        labels = [pair for pair, count in np.ndenumerate(table) for _ in range(int(count))]
        expected = normalized_mutual_info_score([row for row, _ in labels], [column for _, column in labels])
        assert normalised_information(table) == pytest.approx(expected)
    assert normalised_information(np.array([[3, 0], [0, 3]])) == pytest.approx(1)
    assert normalised_information(np.array([[5]])) == 1
    # one row of entropy 0 tells nothing of two columns
    assert normalised_information(np.array([[5, 5]])) == 0
    assert math.isclose(normalised_information(np.array([[2, 2], [2, 2]])), 0, abs_tol=1e-12)


def assert_equal(left: AdapterStatistics, right: AdapterStatistics) -> None:
    assert (left.gating, left.has_universal, left.num_experts) == (right.gating, right.has_universal, right.num_experts)
    assert left.linears == right.linears
    assert list(left.subsets) == list(right.subsets)
    for name, mine in left.subsets.items():
        theirs = right.subsets[name]
        assert (mine.samples, mine.clusters) == (theirs.samples, theirs.clusters)
        assert mine.experts_LE.tolist() == theirs.experts_LE.tolist()
        assert mine.rows_L.tolist() == theirs.rows_L.tolist()
        assert mine.gate_sum_L.tolist() == pytest.approx(theirs.gate_sum_L.tolist(), rel=1e-12)
        assert mine.gate_square_sum_L.tolist() == pytest.approx(theirs.gate_square_sum_L.tolist(), rel=1e-12)
    assert {key: value.tolist() for key, value in left.by_cluster.items()} == {
        key: value.tolist() for key, value in right.by_cluster.items()
    }
