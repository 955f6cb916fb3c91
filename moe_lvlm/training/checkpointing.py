"""Gradient checkpointing of a stage's model: layers whose activations are computed again in the backward pass."""

from __future__ import annotations

from moe_lvlm.models.build import VLM
from moe_lvlm.moe.checkpointing import choose_layers


def enable_checkpointing(model: VLM, wanted: bool | int) -> None:
    """wanted: `train.gradient_checkpointing`. True is every layer that gradients pass, the connector's too; a number is so
    many of the language model's, as `choose_layers` picks them.

    Raises:
        ValueError: more layers than there are.
    """
    if wanted is False:
        return
    modules = list(model.checkpointed_modules())
    chosen = None
    if wanted is not True:
        layers = model.language_layers()
        chosen = {id(part) for index in choose_layers(layers, wanted) for part in layers[index]}
    for module in modules:
        # The reentrant kind loses the gradients of routers.
        module.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embeddings' output need a gradient, for the reentrant kind; below the first trained layer
        # that would keep activations, and compute gradients, for nobody.
        if getattr(module, "_require_grads_hook", None) is not None:
            module.disable_input_require_grads()
        for layer in module.modules():
            if chosen is not None and getattr(layer, "gradient_checkpointing", False) and id(layer) not in chosen:
                layer.gradient_checkpointing = False
