"""The whole connector beside the slow one: paths, outputs, decisions, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.routing.noise import sample_noise
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import CONNECTOR, RoutingContext, RoutingDecision, Site
from tests.connectors.slow_qmoe import (
    HEADS,
    QUERIES,
    ROUTERS,
    WORDS,
    Path,
    SlowQMoE,
    one_sample,
    tiny_batch,
    tiny_config,
    tiny_qmoe,
)

every_router = pytest.mark.parametrize("router", ROUTERS)
DRAWS = torch.tensor([7, 2**40 + 1, -3, 12, 5])


def run(model: QMoEModel, batch: dict[str, Tensor], **further: Any) -> tuple[Tensor, list[RoutingDecision]]:
    """Hidden states, and decisions, lowest layer first."""
    trace = RoutingTrace(RoutingContext.all_language((1, 1), torch.device("cpu")))
    output = model(**batch, trace=trace, **further)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    first = model.config.num_hidden_layers - model.settings.num_layers
    assert [site for site, _ in trace.items()] == [
        Site(CONNECTOR, layer) for layer in range(first, model.config.num_hidden_layers)
    ]
    return output.last_hidden_state, [decision for _, decision in trace.items()]


def paths_of(decisions: list[RoutingDecision]) -> list[tuple[int, ...]]:
    return [tuple(path) for path in torch.cat([d.expert_ids_RK for d in decisions], dim=1).tolist()]


def real(hidden_NLD: Tensor, batch: dict[str, Tensor], index: int) -> Tensor:
    """A sample's positions that are no padding."""
    return hidden_NLD[index][batch["attention_mask"][index].bool()]


def assert_is_path(path: Path, index: int, batch: dict[str, Tensor], found: tuple[Tensor, list[Any]]) -> None:
    hidden, decisions = found
    assert paths_of(decisions)[index] == path.experts
    torch.testing.assert_close(real(hidden, batch, index), path.hidden)
    for decision, logits, weight in zip(decisions, path.logits, path.weights, strict=True):
        torch.testing.assert_close(decision.logits_RE[index], logits)
        torch.testing.assert_close(decision.probs_RE[index], logits.softmax(dim=-1))
        torch.testing.assert_close(decision.weights_RK[index, 0], weight)


@every_router
@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 3, "num_layers": 4, "num_paths": 2},
        {"num_experts": 2, "num_layers": 3, "num_paths": 3, "normalize_output": True},
        {"num_experts": 4, "num_layers": 2, "num_paths": 3, "has_general_expert": False},
        {"num_experts": 3, "num_layers": 3, "num_paths": 1, "has_general_expert": False, "normalize_output": True},
        {"num_experts": 2, "num_layers": 1, "num_paths": 3},
        {"num_experts": 1, "num_layers": 2, "num_paths": 3},
        {"num_experts": 3, "num_layers": 4, "selection": "greedy"},
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_equals_algorithm_1_written_as_loops(router: str, settings: dict[str, Any]) -> None:
    for seed in range(3):
        model = tiny_qmoe(seed, router=router, **settings)
        batch = tiny_batch(4, seed)
        found = run(model, batch)
        slow = SlowQMoE(model)
        with torch.no_grad():
            for index in range(4):
                assert_is_path(slow.search(batch, index), index, batch, found)


@every_router
@pytest.mark.parametrize("has_general", [True, False])
def test_enough_paths_find_the_best_of_all(router: str, has_general: bool) -> None:
    seen = set()
    for seed in range(4):
        model = tiny_qmoe(
            seed, router=router, num_experts=3, num_layers=3, num_paths=27, has_general_expert=has_general
        )
        batch = tiny_batch(3, seed)
        found = run(model, batch)
        with torch.no_grad():
            for index in range(3):
                paths = SlowQMoE(model).all_paths(batch, index)
                assert len(paths) == 27
                assert sum(path.score for path in paths) == pytest.approx(1)
                best = max(paths, key=lambda path: path.score)
                assert_is_path(best, index, batch, found)
                seen.add(best.experts)
    assert len(seen) > 2


def test_a_narrow_beam_and_greedy_may_miss_the_best_path() -> None:
    """The three selections differ somewhere, or the tests above would not tell them apart."""
    differing = dict.fromkeys(("narrow", "greedy"), 0)
    for seed in range(6):
        batch = tiny_batch(5, seed)
        shape: dict[str, Any] = {"num_experts": 4, "num_layers": 4}
        wide = paths_of(run(tiny_qmoe(seed, num_paths=64, **shape), batch)[1])
        narrow = paths_of(run(tiny_qmoe(seed, num_paths=1, **shape), batch)[1])
        greedy = paths_of(run(tiny_qmoe(seed, selection="greedy", **shape), batch)[1])
        differing["narrow"] += wide != narrow
        differing["greedy"] += wide != greedy
    assert all(differing.values())


@every_router
def test_greedy_takes_each_layer_s_best(router: str) -> None:
    model = tiny_qmoe(router=router, num_experts=4, num_layers=4, selection="greedy")
    _, decisions = run(model, tiny_batch(5))
    for decision in decisions:
        assert torch.equal(decision.expert_ids_RK[:, 0], decision.probs_RE.argmax(dim=-1))


@every_router
@pytest.mark.parametrize("is_training", [False, True])
def test_a_sample_does_not_depend_on_its_batch(router: str, is_training: bool) -> None:
    """Alone, without its padding, beside others, more padding: the same path and output, in training with noise too."""
    model = tiny_qmoe(router=router, num_experts=3, num_layers=3).train(is_training)
    batch = tiny_batch(5)
    hidden, decisions = run(model, batch, draw_ids=DRAWS)
    for index in range(5):
        alone = one_sample(batch, index)
        length = int(alone["attention_mask"].sum())
        alone["input_ids"] = alone["input_ids"][:, : length - QUERIES]
        alone["attention_mask"] = alone["attention_mask"][:, :length]
        found = run(model, alone, draw_ids=DRAWS[index : index + 1])
        assert paths_of(found[1]) == [paths_of(decisions)[index]]
        torch.testing.assert_close(found[0][0], real(hidden, batch, index))
    order = torch.tensor([3, 0, 4, 2, 1])
    mixed = {name: value[order] for name, value in batch.items()}
    mixed["input_ids"] = torch.nn.functional.pad(mixed["input_ids"], (0, 3), value=9)
    mixed["attention_mask"] = torch.nn.functional.pad(mixed["attention_mask"], (0, 3))
    found = run(model, mixed, draw_ids=DRAWS[order])
    torch.testing.assert_close(found[0][:, : QUERIES + 1], hidden[order][:, : QUERIES + 1])
    assert paths_of(found[1]) == [paths_of(decisions)[index] for index in order]


def noise_table(model: QMoEModel, draw: Tensor) -> Tensor:
    """[layers, E] of one draw."""
    num_experts, std = model.settings.num_experts, model.settings.noise_std
    layers = range(model.config.num_hidden_layers)
    return torch.stack(
        [sample_noise(draw[None], layer=layer, num_experts=num_experts, std=std)[0].double() for layer in layers]
    )


@every_router
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize_output": True},
        {"has_general_expert": False},
        {"has_general_expert": False, "normalize_output": True},
        {"selection": "greedy"},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_final_path_alone(router: str, settings: dict[str, Any]) -> None:
    """Training with noise: outputs, decisions and all gradients equal those of the chosen path run by itself, through
    outputs and through the decisions' probabilities. Scores of paths carry none, paths that lost neither."""
    model = tiny_qmoe(1, router=router, num_experts=3, num_layers=3, **settings).train()
    batch = tiny_batch(3, 2)
    batch["query_embeds"] = batch["query_embeds"].clone().requires_grad_()
    found = run(model, batch, draw_ids=DRAWS[:3])
    slow = SlowQMoE(model)
    torch.manual_seed(0)
    cotangents = [torch.randn_like(real(found[0], batch, index)) for index in range(3)]
    read = [torch.randn_like(decision.probs_RE) for decision in found[1]]
    loss = sum((real(found[0], batch, index) * cotangents[index]).sum() for index in range(3))
    loss = loss + sum((decision.probs_RE * row).sum() for decision, row in zip(found[1], read, strict=True))
    expected = torch.zeros((), dtype=torch.float64)
    for index in range(3):
        noise_LE = noise_table(model, DRAWS[index])
        with torch.no_grad():
            experts = slow.search(batch, index, noise_LE).experts
        path = slow.along(batch, index, experts, noise_LE)
        assert_is_path(path, index, batch, found)
        expected = expected + (path.hidden * cotangents[index]).sum()
        for logits, row in zip(path.logits, read, strict=True):
            expected = expected + (logits.softmax(dim=-1) * row[index]).sum()
    named = {**dict(model.named_parameters()), "query_embeds": batch["query_embeds"]}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    slow_grads = torch.autograd.grad(expected, list(named.values()), allow_unused=True)
    for name, grad, slow_grad in zip(named, grads, slow_grads, strict=True):
        wanted = torch.zeros_like(named[name]) if slow_grad is None else slow_grad
        assert grad is not None, name  # ZeRO-2 and 3 need one of every parameter on every rank
        torch.testing.assert_close(grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


@every_router
def test_experts_off_the_path_learn_through_the_router_alone(router: str) -> None:
    """CROSS and POST look at every expert's output, PRE and CLS at none."""
    model = tiny_qmoe(router=router, num_experts=3, num_layers=1).eval()
    hidden, (decision,) = run(model, tiny_batch(1))
    chosen = int(decision.expert_ids_RK)
    hidden[:, :QUERIES].sin().sum().backward()
    layer = model.encoder.layer[-1]
    for index, expert in enumerate(layer.experts):
        moves = any(bool(parameter.grad.any()) for parameter in expert.parameters())
        assert moves == (index == chosen or router in ("cross", "post"))
    assert layer.router.weight.grad.any()


def test_the_gate_learns_where_it_is_divided_by_itself() -> None:
    """Without a general expert g / stop_gradient(g) is 1 and still moves the router."""
    model = tiny_qmoe(num_experts=3, num_layers=1, has_general_expert=False, normalize_output=True)
    hidden, (decision,) = run(model, tiny_batch(2))
    assert decision.weights_RK.tolist() == [[1.0], [1.0]]
    hidden[:, :QUERIES].sin().sum().backward()
    assert model.encoder.layer[-1].router.weight.grad.any()


@every_router
def test_gradient_checkpointing_changes_nothing(router: str) -> None:
    """Outputs, gradients, and the trace, whose recompute would double or replace it."""
    results = []
    for is_checkpointed in (False, True):
        model = tiny_qmoe(router=router, num_experts=3, num_layers=3).train()
        for layer in model.encoder.layer:
            for module in layer.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.2
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls: list[int] = []
        model.encoder.layer[-1].experts[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        hidden, decisions = run(model, tiny_batch(4), draw_ids=DRAWS[:4])
        kept = [decision.probs_RE for decision in decisions]
        (hidden.sin().sum() + sum(probs.square().sum() for probs in kept)).backward()
        assert len(calls) == 1 + is_checkpointed
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((hidden, paths_of(decisions), kept, grads))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_qmoe(num_layers=1).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True"):
        model(**tiny_batch(1), draw_ids=DRAWS[:1])


def test_noise_is_training_s_alone_and_is_drawn_from_the_draw() -> None:
    model = tiny_qmoe(num_experts=3, num_layers=3, num_paths=3)
    batch = tiny_batch(5)
    still, decisions = run(model, batch)
    assert torch.equal(run(model, batch, draw_ids=DRAWS)[0], still)
    model.train()
    noisy, noisy_decisions = run(model, batch, draw_ids=DRAWS)
    assert torch.equal(run(model, batch, draw_ids=DRAWS)[0], noisy)
    assert not torch.equal(run(model, batch, draw_ids=DRAWS + 1)[0], noisy)
    # what is recorded of the first layer, which every path reaches alike, is without noise
    torch.testing.assert_close(noisy_decisions[0].logits_RE, decisions[0].logits_RE)
    torch.testing.assert_close(noisy_decisions[0].probs_RE, decisions[0].probs_RE)


def test_training_without_draws() -> None:
    model = tiny_qmoe(num_experts=3).train()
    batch = tiny_batch(2)
    with pytest.raises(ValueError, match=r"connector.experts.noise: 0.5774 in training needs draw_ids"):
        model(**batch)
    model.eval()(**batch)
    tiny_qmoe(num_experts=3, noise=0.0).train()(**batch)
    tiny_qmoe(num_experts=1).train()(**batch)


def test_rows_that_do_not_count() -> None:
    model = tiny_qmoe(num_experts=3)
    batch = tiny_batch(3)
    hidden, decisions = run(model, batch)
    marked, marked_decisions = run(model, batch, is_counted=torch.tensor([True, False, True]))
    assert torch.equal(hidden, marked)
    for decision, plain in zip(marked_decisions, decisions, strict=True):
        assert decision.level == "image"
        assert decision.keep_RK.tolist() == [[True], [False], [True]]
        assert decision.weights_RK[1] == 0
        assert torch.equal(decision.weights_RK[[0, 2]], plain.weights_RK[[0, 2]])
        assert plain.keep_RK.all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_image_is_read_once_a_sample_however_many_paths(attention: str) -> None:
    """Keys and values of the image have a row a sample; only what belongs to a path has one a path. Both kinds of
    attention agree."""
    shapes = {}
    outputs = []
    for num_paths in (1, 3):
        model = tiny_qmoe(num_experts=3, num_layers=4, num_paths=num_paths)
        model.set_attn_implementation(attention)
        rows: dict[str, list[int]] = {"image": [], "words": []}
        for layer in model.encoder.layer:
            layer.attention.attention.key.register_forward_hook(
                lambda module, args, out, rows=rows: rows["words"].append(out.shape[0])
            )
            if layer.has_cross_attention:
                for part in (layer.crossattention.attention.key, layer.crossattention.attention.value):
                    part.register_forward_hook(lambda module, args, out, rows=rows: rows["image"].append(out.shape[0]))
        outputs.append(run(model, tiny_batch(5))[0])
        shapes[num_paths] = rows
    assert shapes[1] == {"image": [5, 5, 5, 5], "words": [5, 15, 5, 5]}
    assert shapes[3] == {"image": [5, 5, 5, 5], "words": [5, 15, 15, 15]}
    model.set_attn_implementation("eager")
    torch.testing.assert_close(outputs[-1], run(model, tiny_batch(5))[0])
    assert outputs[-1].shape[:2] == (5, QUERIES + WORDS)


def test_every_module_is_called_the_same_number_of_times() -> None:
    """Whatever is chosen: ZeRO counts on it."""
    counts = []
    for seed in range(3):
        model = tiny_qmoe(num_experts=3, num_layers=3)
        names: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name, names=names: names.append(name))
        run(model, tiny_batch(2 + seed, seed))
        counts.append(names)
    assert counts[0] == counts[1] == counts[2]


def test_hidden_states_and_attentions_have_a_row_a_path() -> None:
    model = tiny_qmoe(num_experts=3, num_layers=3, num_paths=2)
    model.set_attn_implementation("eager")
    output = model(**tiny_batch(2), output_hidden_states=True, output_attentions=True)
    assert [len(hidden) for hidden in output.hidden_states] == [2, 2, 6, 4, 2]
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    # of layers 0 and 2; the paths of a sample stand side by side
    assert [weights.shape[:3] for weights in output.cross_attentions] == [(2, HEADS, QUERIES), (2, HEADS, 3 * QUERIES)]


@pytest.mark.parametrize("has_autocast", [False, True])
def test_bf16(has_autocast: bool) -> None:
    """Weights in bf16, or autocast around float32 ones: decisions are float32 and outputs near the float64 model's."""
    wide = tiny_qmoe(num_experts=3, num_layers=2, noise=0.5).train()
    model = tiny_qmoe(num_experts=3, num_layers=2, noise=0.5, dtype=torch.float32).train()
    batch = tiny_batch(4, dtype=torch.float32)
    if not has_autocast:
        model.to(torch.bfloat16)
        batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=has_autocast):
        hidden, decisions = run(model, batch, draw_ids=DRAWS[:4])
    hidden.float().sin().sum().backward()
    expected, wide_decisions = run(wide, tiny_batch(4), draw_ids=DRAWS[:4])
    assert {decision.probs_RE.dtype for decision in decisions} == {torch.float32}
    assert {decision.weights_RK.dtype for decision in decisions} == {torch.float32}
    same = torch.tensor([a == b for a, b in zip(paths_of(decisions), paths_of(wide_decisions), strict=True)])
    assert same.sum() >= 2
    torch.testing.assert_close(hidden.double()[same], expected[same], rtol=0, atol=0.3)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "Q-MoE routes by text"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "Q-MoE routes by text"),
        ({"query_embeds": None}, "query_embeds: None; Q-MoE needs"),
        ({"encoder_hidden_states": None, "encoder_attention_mask": None}, "encoder_hidden_states: None; Q-MoE needs"),
        ({"draw_ids": torch.zeros(3, dtype=torch.int64)}, r"draw_ids: torch.int64 of shape \(3,\); allowed: .* \(2,\)"),
        ({"draw_ids": torch.zeros(2)}, "draw_ids: torch.float32"),
        ({"is_counted": torch.zeros(2, dtype=torch.int64)}, "is_counted: torch.int64 .* allowed: torch.bool"),
    ],
    ids=["no text", "empty text", "no queries", "no image", "draws", "draws' type", "counts"],
)
def test_wrong_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_qmoe()(**tiny_batch(2) | change)


def test_too_many_layers() -> None:
    with pytest.raises(ValueError, match=r"connector.experts.num_layers: 5 .* of 4; allowed: 1 to 4"):
        QMoEModel(tiny_config(4), ExpertSettings(num_layers=5))


def test_flex_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="flex"):
        tiny_qmoe().set_attn_implementation("flex_attention")
