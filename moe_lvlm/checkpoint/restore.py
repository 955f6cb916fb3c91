"""Continuing from a checkpoint of any topology: masters, moments and counters into this rank's fragments."""

from __future__ import annotations

from collections.abc import Mapping

from moe_lvlm.checkpoint.fragments import FlatGroup, LiveTraining, create_moments
from moe_lvlm.checkpoint.layout import HAS_OPTIMIZER, MOMENTS, CheckpointError
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.source import BaseSource


def restore_training_state(training: LiveTraining, checkpoint: Checkpoint) -> None:
    """Make a model in training what it was when the checkpoint was saved. Every rank calls it; a collective.

    Sets masters, moments, the optimizer's counts of steps, learning rates, the engine's counters and schedule, the
    weights of frozen parameters (out of the base those that the checkpoint leaves out), buffers; then the model's
    low-precision weights. Only the ranges that this rank holds are read. Not set: random generators (`Checkpoint.rng`)
    and the loop's own state (`Checkpoint.state`).
    Raises CheckpointError if the checkpoint is of another model or of another choice of what is trained, or was
    stripped of its optimizer state.
    """
    if not checkpoint.state.get(HAS_OPTIMIZER, True):
        raise CheckpointError(
            f"{checkpoint.path}: its optimizer state was dropped, so training cannot go on from it; a new run can "
            "start from it (model.from_pretrained)"
        )
    _check_same_tensors(training, checkpoint)
    names = training.names()
    for group in training.groups:
        _prepare_moments(training, group, names, checkpoint)
    base = None if checkpoint.base is None else BaseSource(checkpoint.base, checkpoint.path)
    for fragment in training.fragments():
        if base is not None and fragment.name in base.names():
            fragment.tensor.copy_(base.read_flat(fragment.name, fragment.start, fragment.stop))
        else:
            checkpoint.read_into(fragment.tensor, fragment.name, fragment.kind, fragment.start)
    training.set_learning_rates(checkpoint.state["learning_rates"])
    training.set_facts(checkpoint.state["engine"])
    training.refresh()


def _check_same_tensors(training: LiveTraining, checkpoint: Checkpoint) -> None:
    """Each fragment of ours has its entry with the same shape, and each entry its parameter or buffer."""
    names = training.names()
    trained = {names[id(parameter)] for group in training.groups for parameter in group.parameters}
    expected: dict[str, str] = {fragment.name: "weight" for fragment in training.fragments()}
    expected.update(dict.fromkeys(names.values(), "weight"))
    expected.update(dict.fromkeys(trained, "master"))
    stored = {name: "master" if "master" in kinds else "weight" for name, kinds in checkpoint.index.tensors.items()}
    if checkpoint.base is not None:
        stored |= dict.fromkeys(checkpoint.base.tensors, "weight")
    if expected != stored:
        different = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
        details = [f"{name} (here {_role(expected, name)}, there {_role(stored, name)})" for name in different[:5]]
        raise CheckpointError(f"{checkpoint.path}: {len(different)} tensors differ: {', '.join(details)}")
    shapes = checkpoint.shapes()
    for fragment in training.fragments():
        if shapes[fragment.name] != fragment.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {fragment.name} has shape {shapes[fragment.name]}, the model's is {fragment.shape}"
            )


def _role(roles: Mapping[str, str], name: str) -> str:
    return {"master": "trained", "weight": "frozen", "absent": "absent"}[roles.get(name, "absent")]


def _prepare_moments(
    training: LiveTraining, group: FlatGroup, names: Mapping[int, str], checkpoint: Checkpoint
) -> None:
    """Give the group's master empty moments at the right step, or none if it was never stepped."""
    if training.optimizer is None:
        return
    steps: dict[float | None, str] = {}
    for parameter in group.parameters:
        name = names[id(parameter)]
        for kind in MOMENTS:
            entry = checkpoint.entry(name, kind)
            steps.setdefault(None if entry is None else entry.step, name)
    if len(steps) > 1:
        # possible without ZeRO only, where a parameter without gradient is not stepped; ZeRO steps a group as one
        found = ", ".join(f"{name}: {step}" for step, name in steps.items())
        raise CheckpointError(f"{checkpoint.path}: one optimizer group has parameters with different steps: {found}")
    training.optimizer.state.pop(group.master, None)
    for step in steps:
        if step is not None:
            create_moments(training.optimizer, group, step)
