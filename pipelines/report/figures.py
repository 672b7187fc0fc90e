"""Numbers, times and text as the report shows them; MISSING stands for what is not known."""

import math
import re
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

MISSING = "–"

# Lone surrogates and control characters.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def finite(value: Any) -> bool:
    """Whether a value is a number that can be shown; None is not."""
    return isinstance(value, int | float) and math.isfinite(value)


def count(value: Any) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}" if finite(value) else MISSING


def counted(value: Any, one: str, many: str) -> str:
    """A count with the right form of its noun."""
    return f"{count(value)} {one if value == 1 else many}"


def number(value: Any) -> str:
    """A rate: one decimal below a hundred, none above."""
    if not finite(value):
        return MISSING
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def percent(value: Any) -> str:
    """One decimal; only exactly 0 and 1 are shown as 0% and 100%."""
    if not finite(value):
        return MISSING
    if value in (0, 1):
        return f"{value:.0%}"
    text = f"{value:.1%}"
    return {"100.0%": ">99.9%", "0.0%": "<0.1%"}.get(text, text)


def score(value: Any) -> str:
    """A similarity score with two decimals."""
    return f"{value:.2f}".replace("-0.00", "0.00") if finite(value) else MISSING


def duration(seconds: Any) -> str:
    """Seconds as people say them: 0.31 s, 41.2 s, 10 min 12 s, 3 h 05 min."""
    if not finite(seconds):
        return MISSING
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def date(iso: Any) -> str:
    """An ISO 8601 time in UTC as `23 November 2026, 09:15 UTC`; other text stays as it is."""
    try:
        moment = datetime.fromisoformat(str(iso))
    except ValueError:
        return str(iso or "")
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC)
    zone = " UTC" if moment.tzinfo is not None else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def shorten(text: str, characters: int) -> str:
    """The text, cut to this many characters, the last one an ellipsis."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def printable(value: Any) -> Any:
    """Text without what UTF-8 cannot carry or HTML cannot show; anything else unchanged."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _UNPRINTABLE.sub("\ufffd", value)
