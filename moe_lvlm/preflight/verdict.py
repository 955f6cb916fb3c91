"""What a check of several nodes came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_lvlm.preflight.finding import bad_line, one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """failure: why it failed, None when all is well. bad: nodes that can be blamed, with the reason. gigabytes: per
    second, bus bandwidth, None where it was not measured. facts: for scripts, by key.
    """

    failure: str | None = None
    bad: Mapping[str, str] = field(default_factory=dict)
    gigabytes: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """`fabric ok GIGABYTES KEY=VALUE ...`, or `fabric failed REASON` and `NODE bad REASON` for each bad node."""
        if self.failure is None:
            facts = [f"{key}={value}" for key, value in self.facts.items()]
            return [" ".join(["fabric", "ok", f"{self.gigabytes or 0.0:.2f}", *facts])]
        return [f"fabric failed {one_line(self.failure)}", *(bad_line(node, why) for node, why in self.bad.items())]
