"""What a value is compared with: the result of a section in one line for each bar."""

from __future__ import annotations

import math


def at_least(what: str, value: float, bar: float, aim: float | None = None) -> str:
    return _line(what, value, "at least", bar, value >= bar, aim, aim is not None and value >= aim)


def at_most(what: str, value: float, bar: float, aim: float | None = None) -> str:
    return _line(what, value, "at most", bar, value <= bar, aim, aim is not None and value <= aim)


def _line(what: str, value: float, sense: str, bar: float, met: bool, aim: float | None, aim_met: bool) -> str:
    asked = f"Bar: {what}: {sense} {bar:.3g}" + (f" (aim {aim:.3g})" if aim is not None else "")
    if math.isnan(value) or math.isnan(bar):
        return f"{asked}. Not measured."
    result = "met, the aim too" if aim_met else "met" if met else "MISSED"
    return f"{asked}. Measured {value:.3f}: {result}."
