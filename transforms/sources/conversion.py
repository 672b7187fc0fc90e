"""From what a catalogue holds to ids and metadata of the configured types."""

from typing import Any

from index_builder.errors import ImageError

_TRUTH = {"true": 1, "false": 0}


def convert(value: Any, subject: str, kind: str) -> Any:
    """Converts a found value to a configured type: string, int64, float64 or bool; None stays.

    `subject` begins the text of an error, as in "Feature 'price'". Raises ImageError `bad_metadata`.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        value = text_of(value, subject)
    try:
        if isinstance(value, list | dict):
            raise ValueError("is not a single value")
        if kind == "string":
            return text_of(str(value), subject)
        if kind == "float64":
            return float(value)
        if kind == "bool" and isinstance(value, str):
            value = _TRUTH.get(value.lower(), value)
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError("has a fraction")
        if kind == "bool" and number not in (0, 1):
            raise ValueError("is neither 0 nor 1")
        if not -(2**63) <= number < 2**63:
            raise ValueError("does not fit into 64 bits")
        return bool(number) if kind == "bool" else number
    except (ValueError, OverflowError, TypeError) as error:
        raise ImageError("bad_metadata", f"{subject} is {value!r}, wanted {kind}: {error}") from error


def identifier(value: Any, subject: str) -> str | None:
    """Returns an id as text; None where there is none. Raises ImageError `bad_metadata`.

    Text (or its UTF-8 bytes) and whole numbers are ids; 7.0 and true are not.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, bytes | str | int):
        raise ImageError(
            "bad_metadata", f"{subject} is {value!r}, wanted an id: text or a whole number."
        )
    return text_of(value if isinstance(value, bytes) else str(value), subject) or None


def text_of(value: bytes | str, subject: str) -> str:
    """Returns text that has a form in UTF-8. Raises ImageError `bad_metadata`."""
    try:
        if isinstance(value, bytes):
            return value.decode()
        value.encode()
    except UnicodeError as error:
        raise ImageError("bad_metadata", f"{subject} is not UTF-8: {error}") from error
    return value
