"""The step benchmark: its form, its rivals, what it counts. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.moe import LongTailRouterSettings, MoEConfig, TopKRouterSettings
from moe_lvlm.data.balance import waste
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.losses import auxiliary_loss
from moe_lvlm.training.trainable import select_trainable
from tests.tiny_models import collate, tiny_moe_llava, tiny_samples
from tests.tiny_run import write_run_inputs
from tests.tools.conftest import TOOLS, Import

ALL = {
    "dense",
    "ours",
    "padded",
    "packed",
    "checkpointed",
    "checkpointed_half",
    "full_logits",
    "cached_features",
    "experts_masked",
    "transformers_eager",
    "transformers_grouped_mm",
    "moe_llava",
}


class Bench(NamedTuple):
    command: ModuleType
    engines: ModuleType
    profiling: ModuleType
    rivals: ModuleType
    runs: ModuleType
    samples: ModuleType
    variants: ModuleType


@pytest.fixture(scope="module")
def bench(import_tool: Import) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    names = ("engines", "profile", "rivals", "runs", "samples", "variants")
    yield Bench(import_tool("bench_step"), *(import_tool(f"bench.step_{name}") for name in names))
    torch.set_num_threads(threads)


# What runs in a process of its own, which joins a process group: one after the other, since imports take longest.
CHILD = """
import contextlib, io, json, sys
sys.path.insert(0, {tools!r})
import bench_step
from bench import step_rivals, step_runs

folder = {folder!r}
quick = ["--size", "tiny", "--samples", "4", "--warmup", "0", "--variants", "ours,experts_masked", "--repeats", "2"]
outcomes = {{}}

def run(name, *arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = bench_step.main([*arguments, "--json", f"{{folder}}/{{name}}.json"])
    outcomes[name] = {{"status": status, "said": " ".join(said.getvalue().split())}}

files = ["--markdown", f"{{folder}}/all.md", "--png", f"{{folder}}/all.png", "--profile", f"{{folder}}/traces"]
run("all", *quick[:-4], "--repeats", "1", "--estimate", *files)
run("stage", *quick, "--stage", "tune")

real_seconds, calls = step_runs.StepRun.seconds, []
def seconds(self, clock):
    calls.append(self)
    if len(calls) == 5:  # the second engine's first round; those of the first are complete
        raise KeyboardInterrupt
    return real_seconds(self, clock)
step_runs.StepRun.seconds = seconds
run("interrupted", *quick)
step_runs.StepRun.seconds = real_seconds

real_forward = step_rivals.AllExpertsRouter.forward
def forward(self, x_TD, context):
    decision = real_forward(self, x_TD, context)
    return decision._replace(weights_RK=decision.weights_RK * 0.5)
step_rivals.AllExpertsRouter.forward = forward
run("wrong", *quick)
print(json.dumps(outcomes))
"""


def run_python(*arguments: str) -> str:
    """What an interpreter of its own prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Outcomes(NamedTuple):
    """folder: where files lie. of: status and stderr of each call, by its name."""

    folder: Path
    of: dict[str, dict[str, Any]]

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All variants of the tiny size with every file that the command writes, and calls that end otherwise."""
    folder = tmp_path_factory.mktemp("step")
    said = run_python("-c", CHILD.format(tools=str(TOOLS), folder=str(folder)))
    return Outcomes(folder, json.loads(said.splitlines()[-1]))


def test_json_has_the_agreed_form(outcomes: Outcomes) -> None:
    assert outcomes.of["all"]["status"] == 0
    result = outcomes.read("all")
    # the recipe of a size packs
    assert set(result["variants"]) == ALL - {"packed"}
    assert result["unavailable"] == {"packed": "this is the recipe as given: see ours"}
    config, rows = result["config"], result["variants"]
    assert (config["rounds"], config["samples"], config["world_size"]) == (1, 4, 1)
    for row in rows.values():
        assert row["ratio_to_dense"] > 0 and row["saved_mib"] > 0 and row["milliseconds"] > 0
        assert row["mfu_needed"] > 0 and row["mfu_six_n"] > 0
        assert row["tokens_per_second"] * row["milliseconds"] / 1e3 == pytest.approx(config["tokens"])
        assert row["samples_per_second"] * row["milliseconds"] / 1e3 == pytest.approx(4)
    assert rows["dense"]["ratio_to_dense"] == 1.0
    assert all(row["dropped"] == 0 for name, row in rows.items() if name != "moe_llava")
    assert result["hardware"]["torch"] == torch.__version__


def test_page_figure_and_profiles_are_written(outcomes: Outcomes) -> None:
    rows, folder = outcomes.read("all")["variants"], outcomes.folder
    page = (folder / "all.md").read_text()
    assert all(row["label"] in page for row in rows.values())
    assert "| variant | estimated ms | error |" in page
    assert "packed | not run: this is the recipe as given" in page
    assert (folder / "all.png").read_bytes().startswith(b"\x89PNG")
    for name in rows:
        assert json.loads((folder / "traces" / f"{name}.json").read_text())["traceEvents"]
    parts = (folder / "traces" / "ours.md").read_text()
    for part in ("tower", "attention", "router", "experts", "dense FFN", "head and loss", "optimizer"):
        assert f"| {part} |" in parts


def test_what_the_variants_keep_and_need(outcomes: Outcomes) -> None:
    rows = outcomes.read("all")["variants"]
    saved = {name: row["saved_mib"] for name, row in rows.items()}
    assert saved["checkpointed"] < saved["checkpointed_half"] < saved["ours"] < saved["padded"]
    assert saved["ours"] < saved["experts_masked"]
    assert rows["ours"]["padding"] == 0 < rows["padded"]["padding"] == rows["moe_llava"]["padding"]
    needed = {name: row["tflop_needed"] for name, row in rows.items()}
    # what is needed does not grow with what a variant does besides
    for name in ("padded", "checkpointed", "full_logits", "experts_masked", "transformers_eager", "moe_llava"):
        assert needed[name] == pytest.approx(needed["ours"], rel=1e-6), name
    assert needed["cached_features"] < needed["ours"] and needed["dense"] < needed["ours"]
    for name in ("dense", "ours", "padded", "checkpointed", "checkpointed_half", "cached_features"):
        assert rows[name]["estimated_milliseconds"] > 0
        assert rows[name]["estimated_saved_mib"] == pytest.approx(saved[name], rel=0.05), name
    assert "estimated_milliseconds" not in rows["moe_llava"]
    losses = [row["loss"] for name, row in rows.items() if name != "moe_llava"]
    assert max(losses) - min(losses) < 1e-4 * max(losses)


def test_a_recipe_with_data_on_two_processes(tmp_path: Path) -> None:
    recipe, out = write_run_inputs(tmp_path / "inputs"), tmp_path / "s.json"
    overrides = ["parallel.expert_parallel_size=2", "data.batching=packed"]
    variants = ["--variants", "ours,padded,transformers_eager"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [str(TOOLS / "bench_step.py"), "--model", str(recipe), *overrides, *variants]
    said = run_python(*launcher, *command, "--repeats", "1", "--warmup", "0", "--json", str(out))
    result = json.loads(out.read_text())
    assert result["config"]["world_size"] == 2 and result["config"]["expert_parallel_size"] == 2
    assert set(result["variants"]) == {"dense", "ours", "padded"}
    assert "parallel.expert_parallel_size=1" in result["unavailable"]["transformers_eager"]
    assert said.count("| moe_lvlm, the recipe as given |") == 1  # one process tells


def test_ctrl_c_keeps_the_complete_rounds(outcomes: Outcomes) -> None:
    assert outcomes.of["interrupted"]["status"] == 130
    result = outcomes.read("interrupted")
    assert set(result["variants"]) == {"dense", "ours"} and result["config"]["rounds"] == 2


def test_a_wrong_variant_is_not_timed(outcomes: Outcomes) -> None:
    assert outcomes.of["wrong"]["status"] == 1
    assert "check failed: experts_masked: loss" in outcomes.of["wrong"]["said"]
    assert not (outcomes.folder / "wrong.json").exists()


def test_an_unknown_stage_is_named(outcomes: Outcomes) -> None:
    assert outcomes.of["stage"]["status"] == 2
    assert "tune: no stage of recipe size_tiny; stages: sparse" in outcomes.of["stage"]["said"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "ours,tutel"], "--variants: tutel; allowed: dense, ours, padded"),
        (["--device", "cuda"], "--device: cuda, but torch sees no GPU; allowed: cpu"),
    ],
)
def test_wrong_options_are_named(
    bench: Bench, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.command.main(["--size", "tiny", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["masked", "transformers_eager", "transformers_grouped_mm", "moe_llava"])
def test_rivals_compute_the_same_function(bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts differ and routers are sure here, so that a wrong weight or expert shows; without padding, which other
    stacks route too."""
    monkeypatch.setattr(bench.rivals, "CAPACITY", 4.0)  # of which nothing is dropped
    config = MoEConfig(router=TopKRouterSettings())
    ours, theirs = tiny_moe_llava(config).train(), tiny_moe_llava(config).train()
    select_trainable(theirs, ["experts"])
    bench.rivals.put_in(theirs, kind)
    batch = {name: value for name, value in collate(tiny_samples()[1:2]).items() if name != "labels"}
    torch.testing.assert_close(theirs(**batch).logits, ours(**batch).logits, atol=1e-4, rtol=1e-4)
    # trained are the experts, all of them, and nothing else
    assert _trained(theirs) == _trained_experts(ours)


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _trained_experts(model: nn.Module) -> int:
    return sum(parameter.numel() for _, layer in moe_layers(model) for parameter in layer.experts.parameters())


def test_masked_experts_carry_out_a_long_tail(bench: Bench) -> None:
    config = MoEConfig(router=LongTailRouterSettings(tail_k=3))
    ours, masked = tiny_moe_llava(config).train(), tiny_moe_llava(config).train()
    bench.rivals.put_in(masked, "masked")
    batch = {name: value for name, value in collate(tiny_samples()).items() if name != "labels"}
    results = [model(**batch, output_routing=True) for model in (ours, masked)]
    is_token_BS = batch["attention_mask"].bool()
    torch.testing.assert_close(results[1].logits[is_token_BS], results[0].logits[is_token_BS], atol=1e-4, rtol=1e-4)
    losses = [auxiliary_loss(result.routing, config) for result in results]
    torch.testing.assert_close(losses[1], losses[0])
    for (_, mine), (_, theirs) in zip(results[0].routing.items(), results[1].routing.items(), strict=True):
        assert theirs.keep_RK.all() and not mine.keep_RK.all()


def test_moe_llava_counts_what_its_capacity_drops(bench: Bench) -> None:
    model = tiny_moe_llava(MoEConfig()).train()
    for _, layer in moe_layers(model):  # every token to experts 0 and 1
        with torch.no_grad():
            layer.router.gate.weight.zero_()
    bench.rivals.put_in(model, "moe_llava")
    batch = collate(tiny_samples()[1:2])
    model(**batch)
    num_tokens = batch["input_ids"].numel()
    taken = -(-3 * num_tokens // 4)  # capacity 1.5: an expert takes 1.5 * 2 * T / 4 rows
    for layer in bench.rivals.rival_layers(model):
        assert int(layer.dropped) == 2 * (num_tokens - taken)
        assert layer.auxiliary.requires_grad


def test_layers_that_another_stack_does_not_have_are_refused(bench: Bench) -> None:
    with pytest.raises(bench.rivals.UnavailableError, match="SwiGLU without biases"):
        bench.rivals.put_in(tiny_moe_llava(MoEConfig(), "phi"), "transformers_eager")


class _Engine:
    """As much of an engine as a wrapper needs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)


def test_all_logits_give_transformers_loss(bench: Bench) -> None:
    config = MoEConfig()
    model = tiny_moe_llava(config).train()
    batch = collate(tiny_samples())
    engine = bench.engines.AllLogits(_Engine(model))
    output = engine(**batch, num_items_in_batch=torch.tensor(5.0), output_routing=False)
    assert output.logits.shape[:2] == batch["input_ids"].shape and output.routing is None
    expected = nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(output.language_loss, expected / 5)
    trace = model(**batch, output_routing=True).routing
    torch.testing.assert_close(output.loss, expected / 5 + auxiliary_loss(trace, config))


def test_saved_bytes_are_counted_once_and_without_parameters(bench: Bench) -> None:
    weight = nn.Linear(32, 32, bias=False)
    x_TD = torch.ones(64, 32, requires_grad=True)
    # both products save x (once), exp its result; the weight is a parameter
    _, saved = bench.engines.watch_saved(lambda: (weight(x_TD) + x_TD @ weight.weight).exp(), weight)
    assert saved == pytest.approx(2 * 64 * 32 * 4 / 2**20)


def test_checkpointing_is_set_and_taken_back(bench: Bench) -> None:
    model = tiny_moe_llava(MoEConfig()).train()
    layers = model.get_decoder().layers
    for setting, expected in ((True, [True] * 3), (2, [False, True, True]), (False, [False] * 3)):
        bench.engines.set_checkpointing(model, setting)
        # layers 0 and 2 have experts: 1 comes first, and then the last
        assert [layer.gradient_checkpointing for layer in layers] == expected
    model.get_input_embeddings().weight.requires_grad_(False)
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_what_the_dense_floor_trains(bench: Bench) -> None:
    moe = r"re:^model\.language_model\.layers\.(0|2)\.mlp\."
    others = r"re:^model\.language_model\.layers\.((?!(?:0|2)\.)\d+)\.mlp\."
    assert bench.engines.dense_parts(["moe"], (0, 2)) == (moe,)
    assert bench.engines.dense_parts(["experts", "router", "connector"], (0, 2)) == (moe, "connector")
    assert bench.engines.dense_parts(["released"], (0, 2)) == (moe, others, "connector")
    assert bench.engines.dense_parts(["router"], (0, 2)) == ()
    model = as_dense(bench)
    select_trainable(model, bench.engines.dense_parts(["moe"], (0, 2)))
    assert {name.split(".")[3] for name, one in model.named_parameters() if one.requires_grad} == {"0", "2"}
    select_trainable(model, bench.engines.dense_parts(["dense_ffn"], (0, 2)))
    assert {name.split(".")[3] for name, one in model.named_parameters() if one.requires_grad} == {"1"}


def as_dense(bench: Bench) -> nn.Module:
    config = tiny_moe_llava(MoEConfig()).config.with_moe(None)
    return bench.engines.MoELlavaForConditionalGeneration(config)


def test_settings_of_variants(bench: Bench, tmp_path: Path) -> None:
    recipe = load_recipe(bench.command.SIZES / "tiny.yaml")
    of = {one.name: one for one in bench.variants.STEP_VARIANTS}
    settle = bench.variants.settle
    ours = settle(of["ours"], recipe, 0)
    assert (ours.kind, ours.is_packed, ours.checkpointed, ours.is_cached) == ("ours", True, False, False)
    assert settle(of["checkpointed_half"], recipe, 0).checkpointed == 2  # of four layers
    stack = settle(of["moe_llava"], recipe, 0)
    assert (stack.is_packed, stack.checkpointed, stack.has_all_logits) == (False, True, True)
    dense = load_recipe(
        bench.command.SIZES / "tiny.yaml", ["stages.0.upcycle=false", "stages.0.train=[language_model]"]
    )
    assert settle(of["dense"], dense, 0).kind == "ours"
    with pytest.raises(bench.rivals.UnavailableError, match="has no experts"):
        settle(of["experts_masked"], dense, 0)


def test_drawn_texts_have_llavas_lengths(bench: Bench) -> None:
    """A random batch of 16 is padding to 45 %, as LLaVA-mix-665k's are; a smaller tower's in the same proportion."""
    for visual in (576, 144):
        sizes = bench.samples.draw_lengths(16 * 400, visual, seed=0)
        padding, _ = waste(sizes[:, 0].reshape(-1, 16).tolist(), 8, False)
        assert padding == pytest.approx(0.45, abs=0.03)
        assert set(sizes[:, 1]) == {0, 1}


def test_drawn_samples_are_those_of_any_number_of_processes(bench: Bench) -> None:
    recipe = load_recipe(bench.command.SIZES / "tiny.yaml", ["stages.0.micro_batch=2", "stages.0.global_batch=8"])
    draw = bench.samples.draw_samples
    whole = draw(recipe, 0, SimpleNamespace(rank=0, size=1), seed=3)
    halves = [draw(recipe, 0, SimpleNamespace(rank=rank, size=2), seed=3) for rank in (0, 1)]
    assert [len(one.micro_batches) for one in (whole, *halves)] == [4, 2, 2]
    flat = [sample for one in whole.micro_batches for sample in one]
    parted = [[sample for one in half.micro_batches for sample in one] for half in halves]
    for number, sample in enumerate(flat):
        assert torch.equal(sample.input_ids, parted[number % 2][number // 2].input_ids)
    with_images = [sample for sample in flat if sample.pixel_values is not None]
    assert with_images and all(float(sample.pixel_values.std()) > 0.9 for sample in with_images)
    for sample in flat:
        assert int((sample.input_ids == whole.image_token_id).sum()) == sum(sample.image_tokens)
        assert (sample.labels != -100).any() and not (sample.labels == whole.image_token_id).any()


class TinyAttention(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class TinyMLP(nn.Linear):
    pass


class TinyDecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = TinyAttention(32, 32), TinyMLP(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + checkpoint(self.mlp, x, use_reentrant=False)


def test_time_goes_to_the_parts_that_ran(bench: Bench) -> None:
    layer, x = TinyDecoderLayer(), torch.randn(64, 32)
    optimizer = torch.optim.AdamW(layer.parameters())
    with profile(with_stack=True, acc_events=True) as profiler:
        layer(x).sum().backward()
        optimizer.step()
    parts = bench.profiling.time_by_part(profiler.events(), is_cuda=False)
    attention, mlp = parts["attention"], parts["dense FFN"]
    assert attention["forward"] > 0 and attention["backward"] > 0 and attention["recompute"] == 0
    assert mlp["forward"] > 0 and mlp["backward"] > 0 and mlp["recompute"] > 0
    assert parts["optimizer"]["rest"] > 0 and parts["gradients"]["backward"] > 0
    assert parts["norms and residuals"]["forward"] > 0  # the sum in the layer itself
    page = bench.profiling.part_table(parts, title="tiny", is_cuda=False)
    assert page.index("| part |") < page.index("| attention |")


def made_event(
    name: str, parent: Any = None, *, number: int = -1, cpu: float = 0, device: float = 0, **fields: Any
) -> Any:
    """As much of a profiler's event as is read. cpu, device: its own microseconds."""
    given = {"thread": 1, "fwd_thread": 0, "device_type": DeviceType.CPU, "start": 0.0} | fields
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        sequence_nr=number,
        self_cpu_time_total=cpu,
        self_device_time_total=device,
        thread=given["thread"],
        fwd_thread=given["fwd_thread"],
        device_type=given["device_type"],
        time_range=SimpleNamespace(start=given["start"]),
    )


def made_events() -> list[Any]:
    """A step on a GPU: its backward pass is another thread's, and its kernels are events of their own."""
    tower = made_event("nn.Module: CLIPVisionModel_0")
    seen = made_event("nn.Module: CLIPAttention_0", tower)
    model = made_event("nn.Module: MoELlavaForConditionalGeneration_0")
    attention = made_event("nn.Module: LlamaAttention_3", model)
    router = made_event("nn.Module: TopKRouter_0", made_event("nn.Module: MoELayer_0", model))
    # without a gradient, so the next operator carries the same number and makes the node
    made_by_router = made_event("aten::sort", router, number=7, device=10, start=1.0)
    product = made_event("aten::mm", attention, number=7, cpu=3, device=100, start=2.0)
    head = made_event("aten::mm", made_event("nn.Module: Linear_9", model), number=8, device=200, start=3.0)
    backward = made_event("autograd::engine::evaluate_function: MmBackward0", number=7, thread=2, fwd_thread=1)
    again = made_event("nn.Module: LlamaMLP_1", made_event("nn.Module: LlamaDecoderLayer_1", backward))
    gathered = made_event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", thread=2)
    kernels = {"device_type": DeviceType.CUDA, "thread": 0}
    return [
        tower, seen, model, attention, router, made_by_router, product, head, backward, again, gathered,
        made_event("aten::mm", seen, device=50),
        made_event("aten::mm", backward, device=300, thread=2),
        made_event("aten::mm", again, number=7, device=70, thread=2, start=9.0),
        made_event("aten::add_", gathered, device=20),
        made_event("aten::addcdiv_", made_event("Optimizer.step#AdamW.step"), device=30),
        made_event("gemm", device=750, **kernels),
        made_event("launched by no operator", device=40, **kernels),
    ]  # fmt: skip


def test_time_by_part_by_hand(bench: Bench) -> None:
    parts = bench.profiling.time_by_part(made_events(), is_cuda=True)
    found = {(part, phase): ms for part, phases in parts.items() for phase, ms in phases.items() if ms}
    assert found == pytest.approx(
        {
            ("tower", "forward"): 0.05,  # its attention is the tower's
            ("attention", "forward"): 0.1,
            ("attention", "backward"): 0.3,  # the node's number is the product's, not the sort's
            ("router", "forward"): 0.01,
            ("head and loss", "forward"): 0.2,
            ("dense FFN", "recompute"): 0.07,
            ("gradients", "backward"): 0.02,
            ("optimizer", "rest"): 0.03,
            ("other", "rest"): 0.01,  # 790 us of kernels, 780 of them with an operator
        }
    )
    # on a CPU the operators' own time, without the frames that enclose them
    parts = bench.profiling.time_by_part(made_events(), is_cuda=False)
    assert {part: sum(phases.values()) for part, phases in parts.items()} == {"attention": pytest.approx(0.003)}
