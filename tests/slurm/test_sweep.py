"""A sweep's runs: all combinations, each with a folder and overrides of its own."""

from __future__ import annotations

import pytest

from moe_lvlm.slurm.site import JobError
from moe_lvlm.slurm.sweep import variants


def test_all_combinations_in_order() -> None:
    found = variants(["seed=0,1", "train.precision=bf16,fp32"])
    assert [variant.overrides for variant in found] == [
        ("seed=0", "train.precision=bf16"),
        ("seed=0", "train.precision=fp32"),
        ("seed=1", "train.precision=bf16"),
        ("seed=1", "train.precision=fp32"),
    ]
    assert found[1].name == "seed=0,train.precision=fp32"


def test_a_value_may_hold_commas_in_brackets() -> None:
    found = variants(["moe.balance={on: [language, vision]},{on: [language]}"])
    assert [variant.overrides[0] for variant in found] == [
        "moe.balance={on: [language, vision]}",
        "moe.balance={on: [language]}",
    ]
    assert found[0].name == "moe.balance=_on_language_vision_"


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["seed"], "--sweep 'seed'; allowed: key=value,value"),
        (["seed="], "allowed: key=value"),
        (["seed=0,,1"], "allowed: key=value"),
        (["=1"], "allowed: key=value"),
        (["seed=0,1", "seed=2"], "swept twice"),
        (["seed=0,0"], "a value stands twice"),
        (["data.chat_template=a/b,a b"], "two runs would have the folder 'data.chat_template=a_b'"),
        (["name=" + "x" * 300], "allowed: 200"),
    ],
)
def test_mistakes(sweep: list[str], words: str) -> None:
    with pytest.raises(JobError, match=words):
        variants(sweep)
