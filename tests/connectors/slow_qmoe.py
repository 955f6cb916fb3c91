"""Q-MoE from the equations, slowly: one sample, one path, one query at a time; and tiny models and batches for it.

Only parameters are read of the model under test. All in the parameters' type, float64 in the tests that compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.connectors.upcycle import upcycle_qformer

WIDTH, HEADS, QUERIES, IMAGE_WIDTH, IMAGE_POSITIONS, WORDS = 16, 2, 3, 10, 5, 4
ROUTERS = ("cross", "pre", "post", "cls")


def tiny_config(depth: int = 4, **fields: Any) -> InstructBlipQFormerConfig:
    """Dropout is 0 but where a test wants it. Layers 0, 2, ... look at the image."""
    return InstructBlipQFormerConfig(
        **{
            "vocab_size": 30,
            "hidden_size": WIDTH,
            "num_hidden_layers": depth,
            "num_attention_heads": HEADS,
            "intermediate_size": 20,
            "encoder_hidden_size": IMAGE_WIDTH,
            "max_position_embeddings": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.3,
        }
        | fields
    )


def tiny_qmoe(seed: int = 0, *, depth: int = 4, dtype: torch.dtype = torch.float64, **settings: Any) -> QMoEModel:
    """Every parameter of its own, biases and norms too, so that experts differ and a forgotten parameter shows."""
    torch.manual_seed(seed)
    model = QMoEModel(tiny_config(depth), ExpertSettings(**{"num_layers": 2} | settings))
    _shake(model)
    return model.to(dtype).eval()


def tiny_qformer(seed: int = 0, *, depth: int = 4, **fields: Any) -> InstructBlipQFormerModel:
    torch.manual_seed(seed)
    model = InstructBlipQFormerModel(tiny_config(depth, **fields))
    _shake(model)
    return model.eval()


def tiny_upcycled(dense: InstructBlipQFormerModel, **settings: Any) -> QMoEModel:
    return upcycle_qformer(dense, ExpertSettings(**{"num_layers": 2} | settings))


@torch.no_grad()
def _shake(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        # Router weights large enough to tell experts apart
        parameter.add_(torch.randn_like(parameter) * (0.8 if ".router." in name else 0.1))


def tiny_batch(num_samples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Texts of 1 to WORDS words, padded on the right, and images of which all but the first lack a last position."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (i + seed) % WORDS for i in range(num_samples)]
    words = torch.stack([(torch.arange(WORDS) < length).long() for length in lengths])
    seen = torch.ones(num_samples, IMAGE_POSITIONS, dtype=torch.int64)
    seen[1:, -1] = 0
    return {
        "input_ids": torch.randint(1, 30, (num_samples, WORDS), generator=generator) * words,
        "attention_mask": torch.cat([words.new_ones(num_samples, QUERIES), words], dim=1),
        "query_embeds": torch.randn(1, QUERIES, WIDTH, generator=generator).to(dtype).expand(num_samples, -1, -1),
        "encoder_hidden_states": torch.randn(num_samples, IMAGE_POSITIONS, IMAGE_WIDTH, generator=generator).to(dtype),
        "encoder_attention_mask": seen,
    }


def one_sample(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """A batch of one."""
    return {name: value[index : index + 1] for name, value in batch.items()}


@dataclass
class Path:
    """One path of one sample: hidden states [Q + S, D] of unpadded positions, experts so far, product of their g."""

    hidden: Tensor
    experts: tuple[int, ...]
    score: float
    weights: tuple[Tensor, ...] = ()
    logits: tuple[Tensor, ...] = ()


class SlowQMoE:
    """noise_LE: added to the scores of layer and expert, or None."""

    def __init__(self, model: QMoEModel) -> None:
        self.tensors = dict(model.named_parameters())
        self.config, self.settings = model.config, model.settings
        self.first = self.config.num_hidden_layers - self.settings.num_layers

    def start(self, batch: dict[str, Tensor], index: int) -> tuple[Path, Tensor]:
        """A sample's path before the first layer with experts, and its image."""
        image = batch["encoder_hidden_states"][index][batch["encoder_attention_mask"][index].bool()]
        num_words = int(batch["attention_mask"][index].sum()) - QUERIES
        words = [
            self.tensors["embeddings.word_embeddings.weight"][int(batch["input_ids"][index, i])]
            + self.tensors["embeddings.position_embeddings.weight"][i]
            for i in range(num_words)
        ]
        hidden = torch.cat([batch["query_embeds"][index], torch.stack(words)])
        hidden = self._norm("embeddings.layernorm", hidden)
        for layer in range(self.first):
            query, text = self.attend(hidden, image, layer)
            hidden = torch.cat([self.ffn(f"encoder.layer.{layer}.", "_query", query), self.text(text, layer)])
        return Path(hidden, (), 1.0), image

    def extend(self, path: Path, image: Tensor, noise_LE: Tensor | None) -> list[Path]:
        """The path by every expert of its next layer (algorithm 1, lines 11 to 14)."""
        layer = self.first + len(path.experts)
        prefix = f"encoder.layer.{layer}."
        x, text = self.attend(path.hidden, image, layer)
        text = self.text(text, layer)
        outputs = [self.ffn(f"{prefix}experts.{i}.", "_query", x) for i in range(self.settings.num_experts)]
        scores = slow_scores(self.settings.router, x, outputs, text[0], self.tensors[f"{prefix}router.weight"])
        noisy = scores if noise_LE is None else [score + noise_LE[layer, i] for i, score in enumerate(scores)]
        total = sum(score.exp() for score in noisy)
        longer = []
        for i, output in enumerate(outputs):
            gate = noisy[i].exp() / total
            query, weight = self.combine(x, gate, output, prefix)
            longer.append(
                Path(
                    torch.cat([query, text]),
                    (*path.experts, i),
                    path.score * float(gate.detach()),
                    (*path.weights, weight),
                    (*path.logits, torch.stack(scores)),
                )
            )
        return longer

    def combine(self, x: Tensor, gate: Tensor, output: Tensor, prefix: str) -> tuple[Tensor, Tensor]:
        normalize = self.settings.normalize_output
        if self.settings.has_general_expert:
            general = self.ffn(f"{prefix}general.", "_query", x)
            if normalize:
                return (general + gate * output) / (1 + gate), gate / (1 + gate)
            return general + gate * output, gate
        weight = gate / gate.detach() if normalize else gate
        return weight * output, weight

    def search(self, batch: dict[str, Tensor], index: int, noise_LE: Tensor | None = None) -> Path:
        """Algorithm 1, or greedy."""
        start, image = self.start(batch, index)
        paths = [start]
        for depth in range(self.settings.num_layers):
            paths = [longer for path in paths for longer in self.extend(path, image, noise_LE)]
            is_greedy = self.settings.selection == "greedy"
            if depth > 0 or is_greedy:
                paths.sort(key=lambda path: -path.score)  # stable
                paths = paths[: 1 if is_greedy else self.settings.num_paths]
        return max(paths, key=lambda path: path.score)

    def all_paths(self, batch: dict[str, Tensor], index: int) -> list[Path]:
        """All E^n of them, in order of their experts."""
        start, image = self.start(batch, index)
        paths = [start]
        for _ in range(self.settings.num_layers):
            paths = [longer for path in paths for longer in self.extend(path, image, None)]
        return paths

    def along(
        self, batch: dict[str, Tensor], index: int, experts: tuple[int, ...], noise_LE: Tensor | None = None
    ) -> Path:
        """A given path."""
        path, image = self.start(batch, index)
        for expert in experts:
            path = self.extend(path, image, noise_LE)[expert]
        return path

    def attend(self, hidden: Tensor, image: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Queries and words after attention."""
        attended = self._attention(f"encoder.layer.{layer}.attention.", hidden, hidden)
        query, text = attended[:QUERIES], attended[QUERIES:]
        if layer % self.config.cross_attention_frequency == 0:
            query = self._attention(f"encoder.layer.{layer}.crossattention.", query, image)
        return query, text

    def text(self, text: Tensor, layer: int) -> Tensor:
        return self.ffn(f"encoder.layer.{layer}.", "", text)

    def ffn(self, prefix: str, kind: str, x: Tensor) -> Tensor:
        """LN(x + W2 gelu(W1 x))"""
        hidden = self._linear(f"{prefix}intermediate{kind}.dense", x)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return self._norm(f"{prefix}output{kind}.LayerNorm", x + self._linear(f"{prefix}output{kind}.dense", hidden))

    def _attention(self, prefix: str, x: Tensor, source: Tensor) -> Tensor:
        query, key, value = (
            self._linear(f"{prefix}attention.{name}", tensor)
            for name, tensor in (("query", x), ("key", source), ("value", source))
        )
        width = WIDTH // HEADS
        heads = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            weights = (query[:, part] @ key[:, part].t() / math.sqrt(width)).softmax(dim=-1)
            heads.append(weights @ value[:, part])
        out = self._linear(f"{prefix}output.dense", torch.cat(heads, dim=1))
        return self._norm(f"{prefix}output.LayerNorm", x + out)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].t() + self.tensors[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return centred / scale * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]


def slow_scores(router: str, x: Tensor, outputs: list[Tensor], cls: Tensor, weight: Tensor) -> list[Tensor]:
    """W c of each expert for one row: x [Q, D], outputs [Q, D] each, cls [D]."""
    num_queries, width = x.shape
    scores = []
    for i, output in enumerate(outputs):
        if router == "cross":
            similar = [sum(cls[d] * output[q, d] for d in range(width)) / math.sqrt(width) for q in range(num_queries)]
            attention = torch.stack(similar).exp() / torch.stack(similar).exp().sum()
            read = sum(attention[q] * output[q] for q in range(num_queries))
            row = weight[0]
        elif router == "pre":
            read, row = sum(x[q] for q in range(num_queries)) / num_queries, weight[i]
        elif router == "post":
            read, row = sum(output[q] for q in range(num_queries)) / num_queries, weight[0]
        else:
            read, row = cls, weight[i]
        scores.append((row * read).sum())
    return scores
