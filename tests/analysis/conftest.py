"""A small trace worked out by hand, and run folders made up from a seed, as training and evaluation write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from moe_lvlm.analysis.adapters import AdapterStatistics
from moe_lvlm.analysis.examples import ExampleStore
from moe_lvlm.analysis.foreground import pool_patches
from moe_lvlm.analysis.instructions import Instruction, InstructionSample
from moe_lvlm.analysis.paths import PathStatistics
from moe_lvlm.analysis.run_folder import TRAINING_DATA
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.config.adapter import Gating, MoCLESettings
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision, Site
from tests.analysis.traces import adapter_trace, connector_trace

STAGES = (("align", 60), ("tune", 120), ("moe", 90))
CONNECTOR_LAYERS = (6, 7, 8, 9, 10, 11)
GRID = 6
PATCH = 8

SURE, HALF, EVEN, LAST = (1.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), (0.25,) * 4, (0.0, 0.0, 0.0, 1.0)


@pytest.fixture
def hand_trace() -> RoutingTrace:
    """Two samples of five tokens, four experts, top 2, tail tokens all four. Population variances over the experts:
    SURE .1875, HALF .0625, EVEN 0. Image 0 has a mean of .25 / 3, so its tail is the SURE token; image 1 of .03125,
    so its tail is HALF (which the mean over the batch, .0625, would not give)."""
    pad, language, vision = int(Modality.PADDING), int(Modality.LANGUAGE), int(Modality.VISION)
    context = RoutingContext(
        modality_BS=torch.tensor(
            [[language, vision, vision, vision, pad], [vision, vision, language, language, pad]], dtype=torch.int8
        ),
        image_BS=torch.tensor([[-1, 0, 0, 0, -1], [1, 1, -1, -1, -1]], dtype=torch.int32),
        sample_BS=torch.tensor([[0, 0, 0, 0, -1], [1, 1, 1, 1, -1]], dtype=torch.int32),
    )
    # fmt: off
    probs = [HALF, SURE,         EVEN,   HALF,   SURE,
             HALF, EVEN,         LAST,   EVEN,   SURE]
    experts = [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3],
               [0, 1, 2, 3], [0, 1, 2, 3], [3, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    slots = [2, 4, 2, 2, 0,
             4, 2, 2, 2, 0]
    # fmt: on
    probs_TE = torch.tensor(probs)
    keep_TK = torch.arange(4)[None, :] < torch.tensor(slots)[:, None]
    trace = RoutingTrace(context)
    decision = RoutingDecision(probs_TE.clamp(min=1e-9).log(), probs_TE, torch.tensor(experts), probs_TE, keep_TK)
    trace.record(Site("language_model", 2), decision)
    return trace


@pytest.fixture(scope="session")
def run_maker() -> Callable[..., Path]:
    """`make_run`."""
    return make_run


def make_run(
    path: Path,
    *,
    evaluated: bool = True,
    moe: bool = True,
    qmoe: bool = False,
    gating: Gating | None = None,
    layers: tuple[int, ...] = (0, 2),
    num_experts: int = 4,
) -> Path:
    """Write a run's folder; `path` itself. moe: in the language model; qmoe: in the connector; gating: of LoRA experts."""
    path.mkdir(parents=True)
    content = recipe(num_experts=num_experts, moe=moe, qmoe=qmoe)
    if gating is not None:
        content["model"]["adapter"] = MoCLESettings(gating=gating, num_clusters=5).model_dump(mode="json")
        content["stages"][-1]["adapt"] = True
    (path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (path / "environment.txt").write_text("python 3.11\ntorch 2.13.0\n")
    (path / "DONE").touch()
    events = log_events(layers=layers if moe else (), num_experts=num_experts, qmoe=qmoe)
    (path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if evaluated:
        write_evaluation(path, layers=layers if moe else (), num_experts=num_experts)
    if evaluated and qmoe:
        write_paths(path)
    if evaluated and gating is not None:
        write_adapters(path, gating)
    return path


def recipe(*, num_experts: int, moe: bool, qmoe: bool) -> dict[str, Any]:
    experts = {
        "num_experts": 3, "has_general_expert": True, "num_layers": 6, "router": "cross", "selection": "path",
        "num_paths": 3, "normalize_output": False, "noise": None, "importance_coefficient": 0.01,
    }  # fmt: skip
    return {
        "name": "synthetic",
        "seed": 3,
        "model": {
            "vision_tower": {"from_pretrained": "package:quickstart/tower"},
            "language_model": {"from_config": {"model_type": "llama"}},
        }
        | ({"connector": {"kind": "qmoe", "experts": experts}} if qmoe else {}),
        "evaluation": {"tasks": [{"name": "scenes", "metric": "exact_match"}, {"name": "captions", "metric": "cider"}]},
        "moe": {
            "layers": "sparse",
            "num_experts": num_experts,
            "top_k": 2,
            "router": {"kind": "ltdr", "tail_k": None, "tail_scope": "batch"},
            "balance": {"coefficient": 0.01, "on": ["language"]},
        },
        "train": {"precision": "fp32"},
        "parallel": {"deepspeed": "zero2", "expert_parallel_size": 2},
        "stages": [
            {"name": name, "train": ["connector"], "upcycle": moe and name == "moe", "steps": steps}
            for name, steps in STAGES
        ],
    }


def log_events(*, layers: tuple[int, ...], num_experts: int, qmoe: bool) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    events: list[dict[str, Any]] = []
    step = 0
    for index, (stage, steps) in enumerate(STAGES):
        events.append(
            {"event": "stage", "stage": stage, "index": index, "steps": steps, "trainable": 51_234 * (index + 1),
             "total": 1_234_567, "micro_batch": 16, "global_batch": 64, "learning_rate": 0.002, "time": 0.0}
        )  # fmt: skip
        for number in range(1, steps + 1):
            step += 1
            loss = float(3.2 * np.exp(-step / 70) + 0.15 + 0.05 * random.standard_normal())
            routed = stage == "moe" and layers
            loads = {
                f"connector.{layer}": {
                    "language": [0, 0, 0], "vision": (32 * random.multinomial(64, random.dirichlet([20] * 3))).tolist()
                } for layer in (CONNECTOR_LAYERS if qmoe else ())
            }  # fmt: skip
            events.append(
                {"event": "step", "stage": stage, "step": number, "global_step": step, "loss": loss,
                 "language_loss": loss - 0.01, "balance_loss": 0.01 + 0.002 * random.random() if routed else None,
                 "learning_rate": 0.002, "grad_norm": 1.0, "tokens": 4000, "tokens_per_second": 20000.0,
                 "seconds": 0.2, "epoch": number / steps,
                 "expert_load": ({
                     str(layer): {
                         "language": random.multinomial(2000, random.dirichlet([60] * num_experts)).tolist(),
                         "vision": random.multinomial(6000, random.dirichlet([20] * num_experts)).tolist(),
                     } for layer in layers
                 } if routed else {}) | loads or None,
                 "tail_share": {str(layer): 0.3 for layer in layers} if routed else None}
            )  # fmt: skip
    events.append({"event": "done", "seconds": 61.0})
    return events


def write_evaluation(path: Path, *, layers: tuple[int, ...], num_experts: int) -> None:
    folder = path / "eval" / "scenes"
    folder.mkdir(parents=True)
    (path / "images").mkdir()
    scores = {
        "background": {"accuracy": 0.99, "majority": 0.14, "n": 80},
        "what": {"accuracy": 0.925, "majority": 0.08, "n": 80},
        "count": {"accuracy": 0.71, "majority": 0.36, "n": 80},
        "where": {"accuracy": 0.06, "majority": 0.27, "n": 80},
    }
    (path / "metrics.json").write_text(json.dumps({"eval": scores}))
    random = np.random.default_rng(1)
    statistics, store, lines = RoutingStatistics(), ExampleStore(), []
    for number in range(40):
        image, mask = scene(random)
        name = f"images/{number:03d}.png"
        image.save(path / name)
        foreground = pool_patches(np.asarray(mask) / np.float32(255), PATCH)
        task = list(scores)[number % 4]
        if layers:
            trace = routed_trace(random, foreground, layers=layers, num_experts=num_experts)
            statistics.update(trace, [foreground])
            store.add(
                trace, image_index=0, image=image, grid=(GRID, GRID), key=f"{number}", foreground=foreground,
                question=f"What is in the {task}?", answer="a dog", prediction="a cat",
            )  # fmt: skip
        correct = random.random() < scores[task]["accuracy"]
        lines.append(
            {"key": f"scene-{number}", "task": task, "image": name, "question": f"What about the {task}?",
             "prediction": "dog" if correct else "cat", "answer": "dog", "correct": bool(correct)}
        )  # fmt: skip
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if layers:
        statistics.to_npz(folder / "routing.npz")
        store.to_npz(folder / "examples.npz")


def write_paths(path: Path) -> None:
    """Of 400 images a task: captions and OCR take paths that questions seldom take. And captions have a CIDEr."""
    random = np.random.default_rng(2)
    frequent = random.integers(0, 3, (9, len(CONNECTOR_LAYERS)))
    weights = {
        "caption": [0.45, 0.3, 0.05, 0.05, 0.02, 0.02, 0.05, 0.03, 0.03],
        "ocr": [0.25, 0.45, 0.05, 0.05, 0.05, 0.05, 0.05, 0.03, 0.02],
        "vqa": [0.02, 0.05, 0.5, 0.25, 0.08, 0.02, 0.03, 0.03, 0.02],
        "choice": [0.01, 0.04, 0.15, 0.1, 0.35, 0.25, 0.04, 0.03, 0.03],
    }
    statistics = PathStatistics()
    for task, shares in weights.items():
        taken = frequent[random.choice(len(frequent), 400, p=shares)]
        statistics.update(connector_trace(taken.tolist(), layers=CONNECTOR_LAYERS), [task] * 400)
    folder = path / "eval" / "captions"
    folder.mkdir()
    statistics.save(folder / "paths.json")
    record = {
        "key": "c/0", "task": "caption", "image": None, "question": "A photo of", "prediction": "a dog",
        "answer": "the dog", "correct": False,
    }  # fmt: skip
    (folder / "predictions.jsonl").write_text(json.dumps(record) + "\n")
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["eval"]["caption"] = {"accuracy": 1.392, "majority": 0.21, "n": 400}
    (path / "metrics.json").write_text(json.dumps(metrics))


def write_adapters(path: Path, gating: Gating) -> None:
    """Two training datasets and two tasks of five clusters: captions are in clusters 3 and 4, and cluster 1 has none."""
    random = np.random.default_rng(5)
    shares: dict[str, list[float]] = {
        "ask": [0.6, 0, 0.4, 0, 0],
        "tell": [0, 0, 0, 0.5, 0.5],
        "vqa": [0.7, 0, 0.3, 0, 0],
        "cap": [0, 0, 0, 0, 1],
    }
    linears = [(name, layer) for layer in range(4) for name in ("self_attn.q_proj", "self_attn.v_proj")]
    # a cluster's expert and gate at each linear; at the first linear all clusters take expert 0
    experts_KL = random.integers(0, 4, (5, len(linears)))
    experts_KL[:, 0] = 0
    gates_KL = random.uniform(0.4, 0.95, (5, len(linears)))
    sample = InstructionSample(num_clusters=5)
    parts = {TRAINING_DATA: ("ask", "tell"), "scenes": ("vqa", "cap")}
    for folder, names in parts.items():
        statistics = AdapterStatistics(gating, has_universal=gating == "cluster")
        for name in names:
            clusters = random.choice(5, 60, p=shares[name]).tolist()
            choices = [list(zip(experts_KL[one].tolist(), gates_KL[one].tolist(), strict=True)) for one in clusters]
            known = clusters if gating == "cluster" else None
            trace = adapter_trace(choices, linears=linears, num_experts=4, clusters=known)
            statistics.update(trace, [name] * len(clusters))
            texts = [f"{name} {index % 7} of {one}" for index, one in enumerate(clusters)]
            if folder == TRAINING_DATA:
                sample.datasets[name] = [
                    Instruction(*pair) for pair in zip(texts, known or [None] * len(texts), strict=True)
                ]
        (path / "eval" / folder).mkdir(exist_ok=True)
        statistics.save(path / "eval" / folder / "adapters.json")
    sample.num_clusters = 5 if gating == "cluster" else None
    sample.left_out["gone"] = "data/gone.json: no such file"
    sample.save(path / "eval" / TRAINING_DATA / "instructions.json")


def scene(random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A disc or two on a plain ground, and their mask."""
    side = GRID * PATCH
    image = Image.new("RGB", (side, side), tuple(int(value) for value in random.integers(120, 240, 3)))
    mask = Image.new("L", (side, side), 0)
    for _ in range(int(random.integers(1, 3))):
        left, top = (int(value) for value in random.integers(0, side - 22, 2))
        color = tuple(int(value) for value in random.integers(0, 255, 3))
        ImageDraw.Draw(image).ellipse((left, top, left + 20, top + 20), fill=color)
        ImageDraw.Draw(mask).ellipse((left, top, left + 20, top + 20), fill=255)
    return image, mask


def routed_trace(
    random: np.random.Generator, foreground: np.ndarray, *, layers: tuple[int, ...], num_experts: int
) -> RoutingTrace:
    """One sample: an image and twelve words. The variance rises with the foreground in even places, falls in others."""
    tokens, words = len(foreground), 12
    modality = torch.tensor([[int(Modality.VISION)] * tokens + [int(Modality.LANGUAGE)] * words], dtype=torch.int8)
    context = RoutingContext(
        modality_BS=modality,
        image_BS=torch.tensor([[0] * tokens + [-1] * words], dtype=torch.int32),
        sample_BS=torch.zeros(1, tokens + words, dtype=torch.int32),
    )
    trace = RoutingTrace(context)
    for place, layer in enumerate(layers):
        sharpness = np.concatenate([foreground if place % 2 == 0 else 1 - foreground, np.full(words, 0.5)])
        logits = random.normal(size=(tokens + words, num_experts)) * (0.4 + sharpness[:, None])
        probs = torch.softmax(torch.tensor(logits, dtype=torch.float32), dim=-1)
        top = probs.topk(2, dim=-1)
        decision = RoutingDecision(probs.log(), probs, top.indices, top.values, torch.ones_like(top.values).bool())
        trace.record(Site("language_model", layer), decision)
    return trace
