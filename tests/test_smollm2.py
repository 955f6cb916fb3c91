"""The walk-through of docs/checkpoints.md with real weights: SmolLM2-135M becomes sparse, trains, moves and still talks.

Slow: it downloads 93 MB and needs some minutes, 8 GB of memory and 6 GB of disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from moe_lvlm.checkpoint.reader import Checkpoint
from tests.training.states import contents

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
# Greedy decoding of the dense original answers so; a few steps on other data must not take it away.
QUESTIONS = {"What is the capital of France?": "Paris", "Name three fruits.": "Bananas"}

pytestmark = pytest.mark.slow


def run(folder: Path, *command: str | Path) -> str:
    """A command as a user gives it, in `folder`; what it printed."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
    return found.stdout


def tool(folder: Path, script: str, *arguments: str | Path) -> str:
    return run(folder, sys.executable, TOOLS / script, *arguments)


def recipe(start: str, output: str, *, steps: int, expert_parallel_size: int) -> dict[str, object]:
    return {
        "name": "smol",
        "output_dir": output,
        "model": {"from_pretrained": start},
        "moe": {"num_experts": 4, "top_k": 2, "balance": {"on": ["language"]}},
        "data": {
            "image_root": "package:scenes",
            "mixture": [{"path": "package:scenes/train.json"}],
            "max_length": 256,
        },
        "train": {
            "precision": "fp32",
            "log_every": 1,
            "schedule": {"kind": "constant", "warmup_steps": 0},
            "checkpoint": {"every": 4, "keep_last": 9},
        },
        "parallel": {"expert_parallel_size": expert_parallel_size, "deepspeed": "zero2"},
        "stages": [
            {"name": "sparse", "train": ["moe", "connector"], "steps": steps, "micro_batch": 2, "global_batch": 4,
             "learning_rate": 2.0e-5},
        ],
    }  # fmt: skip


def train(folder: Path, world: int, values: dict[str, object]) -> list[float]:
    """Train; the losses of the steps done now."""
    path = folder / "smol.yaml"
    path.write_text(yaml.safe_dump(values))
    log = folder / str(values["output_dir"]) / "log.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    run(folder, *launcher, "-m", "moe_lvlm", "train", path)
    events = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    return [event["loss"] for event in events if event["event"] == "step"]


def test_smollm2_from_dense_to_sparse_and_out_again(tmp_path: Path) -> None:
    tool(tmp_path, "fetch_smollm2.py", "smollm2")
    tool(tmp_path, "convert.py", "parts", "smollm2", "package:scenes/tower", "-o", "dense", "--feature-layer", "-1")
    tool(tmp_path, "convert.py", "upcycle", "dense", "-o", "sparse", "--experts", "4", "--top-k", "2")

    losses = train(tmp_path, 2, recipe("sparse", "runs/two", steps=6, expert_parallel_size=2))
    assert len(losses) == 6
    assert all(0 < loss < 20 for loss in losses)

    # As of step 4 into a run of its own, in one file, then on with one process at EP 1: steps 5 and 6 are the same.
    tool(
        tmp_path,
        "reshard.py",
        "runs/two/checkpoints/sparse-000004",
        "runs/one/checkpoints/sparse-000004",
        "--files",
        "1",
    )
    moved = tmp_path / "runs/one/checkpoints/sparse-000004"
    assert len(list(moved.glob("rank-*"))) == 1
    assert contents(moved) == contents(tmp_path / "runs/two/checkpoints/sparse-000004")
    assert train(tmp_path, 1, recipe("sparse", "runs/one", steps=6, expert_parallel_size=1)) == pytest.approx(
        losses[4:], abs=1e-4
    )
    assert Checkpoint(tmp_path / "runs/one/checkpoints/sparse-000006").state["world_size"] == 1

    assert "well" in tool(tmp_path, "verify.py", "runs/one")
    said = tool(tmp_path, "export.py", "model", "runs/one", "exported", "--dtype", "float32")
    assert "Qwen2Moe" in said
    ask_in_plain_transformers(tmp_path / "exported")


def ask_in_plain_transformers(folder: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    for question, answer in QUESTIONS.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert answer in text, text
