"""Whether EEA is on, for every router and count."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.eea import has_eea, without_eea


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({"router": {"kind": "ltdr"}}, True),
        ({"router": {"kind": "ltdr", "tail_k": 3}}, True),
        ({"router": {"kind": "ltdr", "tail_k": 2}}, False),
        ({"router": {"kind": "ltdr"}, "top_k": 4}, False),
        ({"router": {"kind": "ltdr", "eea_select": "none"}}, False),
        ({"router": {"kind": "top_k"}}, False),
    ],
)
def test_whether_it_is_on(moe: dict[str, Any], expected: bool) -> None:
    config = MoEConfig.model_validate(moe)
    assert has_eea(config) is expected
    if not expected:
        with pytest.raises(ValueError, match="cannot be switched off"):
            without_eea(config)
        return
    off = without_eea(config)
    assert not has_eea(off)
    assert off.to_dict() == config.to_dict() | {"router": config.to_dict()["router"] | {"eea_select": "none"}}


def test_a_dense_model() -> None:
    assert not has_eea(None)
    with pytest.raises(ValueError, match="the model is dense"):
        without_eea(None)
