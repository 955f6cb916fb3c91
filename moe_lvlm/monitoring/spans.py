"""Times, spans of time and numbers in a reader's words."""

from __future__ import annotations

from datetime import datetime

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def span(seconds: float | None) -> str:
    """Such as 12 s, 4 min 10 s, 2 h 05 min, 3 d 4 h; "-" for None."""
    if seconds is None:
        return "-"
    whole = round(max(seconds, 0.0))
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def clock(moment: float | None, *, now: float) -> str:
    """The local time, with its date unless that is today's; "-" for None."""
    if moment is None:
        return "-"
    local = datetime.fromtimestamp(moment)
    is_today = local.date() == datetime.fromtimestamp(now).date()
    return f"{local:%H:%M:%S}" if is_today else f"{local:%Y-%m-%d %H:%M}"


def figure(value: float | None) -> str:
    """About four figures, without a needless exponent; "-" for None."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.2e}"


def names(items: tuple[str, ...] | list[str], limit: int = 8) -> str:
    """A list that ends early: "n1, n2 and 30 more"."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
