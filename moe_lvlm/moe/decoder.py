"""Decoder layers with a mixture of experts in the place of the FFN, for every supported family.

Each is a subclass of its family's layer class, since transformers records hidden states by class, and holds the dense
layer's own attention and norms. A family is known by the exact names of its layer's children; any other layer raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer

from moe_lvlm.moe.checkpointing import refuse_reentrant
from moe_lvlm.moe.ffn import FUSED_GATED, GATED, TWO_LAYER, FFNLayout
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


class MoEDecoderLayer(nn.Module):
    """What the families' MoE layers share: their parts come from a dense layer, their FFN is a MoELayer."""

    mlp: MoELayer
    _gradient_checkpointing_func: Any
    attention_dropout_name: str | None = None
    ffn_dropout_name: str | None = None

    def __init__(self, dense: nn.Module, moe: MoELayer) -> None:
        nn.Module.__init__(self)
        for name, child in dense.named_children():
            self.add_module(name, moe if name == "mlp" else child)
        # StableLM's second norm is None in its parallel form: an attribute, not a child
        for name in dense._modules.keys() - self._modules.keys():
            self.register_module(name, None)
        # A layer's hooks stay with its place: transformers records hidden states by hooks that it installs once.
        for hooks in _HOOKS:
            getattr(self, hooks).update(getattr(dense, hooks))
        self.gradient_checkpointing = getattr(dense, "gradient_checkpointing", False)
        if self.gradient_checkpointing:
            self._gradient_checkpointing_func = dense._gradient_checkpointing_func
        self.train(dense.training)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            refuse_reentrant(self._gradient_checkpointing_func)
        return super().__call__(*args, **kwargs)

    def _dropout(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else self.get_submodule(name)(x)

    def forward(
        self,
        hidden_states: Tensor,
        routing: RoutingContext | None = None,
        routing_trace: RoutingTrace | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]. kwargs are the attention's, handed on as the dense layer does."""
        residual = hidden_states
        normed = self.get_submodule("input_layernorm")(hidden_states)
        attended, attention_BHSS = self.get_submodule("self_attn")(hidden_states=normed, **kwargs)
        if self.mlp.router.needs_attention and routing is not None:
            routing = replace(routing, attention_BS=instruction_attention(attention_BHSS, routing))
        attended = self._dropout(self.attention_dropout_name, attended)
        if self.is_parallel:
            fed = self._dropout(self.ffn_dropout_name, self.mlp(normed, routing, routing_trace))
            return residual + attended + fed
        residual = residual + attended
        normed = self.get_submodule("post_attention_layernorm")(residual)
        return residual + self._dropout(self.ffn_dropout_name, self.mlp(normed, routing, routing_trace))

    @property
    def is_parallel(self) -> bool:
        """Attention and FFN read the same norm, and their outputs are added at once (Phi, some StableLM)."""
        return self._modules.get("post_attention_layernorm") is None


@torch.no_grad()
def instruction_attention(attention_BHSS: Tensor | None, context: RoutingContext) -> Tensor:
    """Float32 [B, S]: attention that a token gets from its sample's instruction tokens, mean over them and over heads.

    attention_BHSS: weights of this layer's attention, [B, H, S, past + S]. A sample without instruction gives 0.

    Raises:
        ValueError: no weights, or it is not known which tokens are the instruction.
    """
    if attention_BHSS is None:
        raise ValueError(
            "eea_select: instruction_aware needs attention weights, which sdpa and flash attention do not give; "
            "allowed: model.attention: eager"
        )
    if context.instruction_BS is None:
        raise ValueError(
            "eea_select: instruction_aware: it is not known which tokens are the instruction; give instruction_mask "
            "[B, S] beside input_ids, or a routing context"
        )
    num_samples = max(context.count_samples(), 1)
    sample_BS = context.sample_BS.clamp(min=0).long()
    is_asking_BS = context.instruction_BS & (context.sample_BS >= 0)
    count_N = torch.bincount(sample_BS.flatten(), weights=is_asking_BS.flatten().float(), minlength=num_samples)
    from_head_mean_BSS = attention_BHSS.float().mean(dim=1)[..., -sample_BS.shape[1] :]
    # Another sample's tokens, packed into the same row, get no attention, so the sum is over the token's own sample.
    total_BS = (from_head_mean_BSS * is_asking_BS[:, :, None]).sum(dim=1)
    return total_BS / count_N.to(total_BS)[sample_BS].clamp_min(1)


class MoELlamaDecoderLayer(MoEDecoderLayer, LlamaDecoderLayer):
    """LLaMA and Vicuna."""


class MoEMistralDecoderLayer(MoEDecoderLayer, MistralDecoderLayer):
    """Mistral."""


class MoEQwen2DecoderLayer(MoEDecoderLayer, Qwen2DecoderLayer):
    """Qwen1.5 and Qwen2."""


class MoEQwen3DecoderLayer(MoEDecoderLayer, Qwen3DecoderLayer):
    """Qwen3."""


class MoEPhi3DecoderLayer(MoEDecoderLayer, Phi3DecoderLayer):
    """Phi-3."""

    attention_dropout_name = "resid_attn_dropout"
    ffn_dropout_name = "resid_mlp_dropout"


class MoEPhiDecoderLayer(MoEDecoderLayer, PhiDecoderLayer):
    """Phi-1.5 and Phi-2: attention and FFN in parallel."""

    attention_dropout_name = "resid_dropout"
    ffn_dropout_name = "resid_dropout"


class MoEStableLmDecoderLayer(MoEDecoderLayer, StableLmDecoderLayer):
    """StableLM, sequential or parallel."""

    ffn_dropout_name = "dropout"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFamily:
    """A decoder layer that can become sparse.

    dense: its class in transformers, exactly. moe: ours. children: the names of the parts that it may have, exactly;
    another set means a layer that we do not know. ffn: how its FFN is laid out.
    """

    dense: type[nn.Module]
    moe: type[MoEDecoderLayer]
    children: frozenset[str]
    ffn: FFNLayout


_NORMS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})

FAMILIES: tuple[LayerFamily, ...] = (
    LayerFamily(dense=LlamaDecoderLayer, moe=MoELlamaDecoderLayer, children=_NORMS, ffn=GATED),
    LayerFamily(dense=MistralDecoderLayer, moe=MoEMistralDecoderLayer, children=_NORMS, ffn=GATED),
    LayerFamily(dense=Qwen2DecoderLayer, moe=MoEQwen2DecoderLayer, children=_NORMS, ffn=GATED),
    LayerFamily(dense=Qwen3DecoderLayer, moe=MoEQwen3DecoderLayer, children=_NORMS, ffn=GATED),
    LayerFamily(
        dense=Phi3DecoderLayer,
        moe=MoEPhi3DecoderLayer,
        children=_NORMS | {"resid_attn_dropout", "resid_mlp_dropout"},
        ffn=FUSED_GATED,
    ),
    LayerFamily(
        dense=PhiDecoderLayer,
        moe=MoEPhiDecoderLayer,
        children=frozenset({"self_attn", "mlp", "input_layernorm", "resid_dropout"}),
        ffn=TWO_LAYER,
    ),
    LayerFamily(
        dense=StableLmDecoderLayer,
        moe=MoEStableLmDecoderLayer,
        children=_NORMS | {"dropout"},
        ffn=GATED,
    ),
    LayerFamily(
        dense=StableLmDecoderLayer,
        moe=MoEStableLmDecoderLayer,
        children=(_NORMS | {"dropout"}) - {"post_attention_layernorm"},
        ffn=GATED,
    ),
)


def find_family(layer: nn.Module) -> LayerFamily:
    """The family of a dense decoder layer.

    Raises:
        ValueError: its class, or the names of its parts, are not those of a supported family.
    """
    children = frozenset(name for name, _ in layer.named_children())
    for family in FAMILIES:
        if type(layer) is family.dense and children == family.children:
            linears = frozenset(
                name for name, child in layer.get_submodule("mlp").named_children() if isinstance(child, nn.Linear)
            )
            if linears == family.ffn.children:
                return family
    known = ", ".join(sorted({family.dense.__name__ for family in FAMILIES}))
    raise ValueError(
        f"decoder layer {type(layer).__name__} with parts {sorted(children)} cannot become sparse; allowed: {known}, "
        "with the parts that transformers gives them"
    )
