"""Numbers as people read them."""

from __future__ import annotations

from typing import Any


def count(value: Any) -> str:
    """Return a number as people read it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}"


def change(before: float, after: float) -> str:
    """Return the change in percent, such as ``-30.0 %``."""
    return f"{100 * (after - before) / before:+.1f} %".replace("-", "\N{MINUS SIGN}") if before else ""
