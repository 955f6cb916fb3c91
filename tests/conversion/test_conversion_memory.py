"""Memory of a conversion: that of the largest tensor that it writes, whatever the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversion.test_upcycling import write_dense

# Anonymous memory only: source files are mapped, and their pages are the system's. Sampled at every read and write.
MEASURE = """
import json, sys
from pathlib import Path
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.conversion import dense, folder, upcycling

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

peak = 0
def sample(num_bytes=0):
    global peak
    peak = max(peak, anonymous())

class Watched:
    def __init__(self, source): self.source = source
    def __getattr__(self, name): return getattr(self.source, name)
    def read(self, *args):
        sample()
        tensor = self.source.read(*args)
        sample()
        return tensor

command, source, target = sys.argv[1:]
opened = folder.open_model(source)
opened = folder.OpenModel(opened.config, Watched(opened.weights), opened.processor)
if command == "upcycle":
    config, weights = upcycling.upcycle_weights(
        opened.config, opened.weights, MoEConfig(layers=(0,), num_experts=4), router_seed=0)
else:
    config, weights = dense.merge_experts(opened.config, opened.weights, dense.Merge())
converted = folder.Converted(config=config, weights=weights, processor=opened.processor, before={})
summary = folder.summarize(converted)
before = anonymous()
folder.write_converted(converted, Path(target), advance=sample)
print(json.dumps({"used": peak - before, "bytes": summary.num_bytes}))
"""
SLACK = 16 * 2**20  # a piece on its way to the file, and small things
# What is freed goes back to the system at once: measured is what is held, not what malloc keeps for later.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One wide layer: FFN matrices of 24 MiB, 127 MB in all; written by a conversion itself."""
    folder = tmp_path_factory.mktemp("wide")
    return write_dense(
        folder / "dense", hidden_size=512, intermediate_size=12288, num_hidden_layers=1, num_attention_heads=4
    )


def measure(command: str, source: Path, target: Path) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, command, str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    )
    numbers: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return numbers


def test_memory(dense: Path, tmp_path: Path) -> None:
    largest = 4 * 512 * 12288 * 4  # one stack of 4 experts
    upcycled = measure("upcycle", dense, tmp_path / "sparse")
    assert upcycled["bytes"] > 3 * largest
    assert upcycled["used"] < 1.2 * largest + SLACK, upcycled
    merged = measure("dense", tmp_path / "sparse", tmp_path / "dense")
    assert merged["used"] < 1.2 * largest + SLACK, merged
    print(f"used {upcycled['used'] / 2**20:.0f} and {merged['used'] / 2**20:.0f} MiB, largest {largest / 2**20:.0f}")
