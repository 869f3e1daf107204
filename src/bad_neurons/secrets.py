"""Tokens and keys: found in what a person typed, and hidden from whatever is shown or kept."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD)S?$", re.IGNORECASE)  # of environment variables that hold one
_SHORTEST = 8  # characters of a variable's value that counts: a shorter one would be found in ordinary words
_SHAPES = {
    "a name or a password in an address": re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"),
    "a token of the Hugging Face hub": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    "an Authorization header": re.compile(r"(?<=\bBearer )[^\s'\"]{8,}", re.IGNORECASE),
}


def hide(text: str) -> str:
    """``text`` with ``***`` for every secret: the values of this machine's secret variables, and what has the shape of one."""
    for value in _values():
        text = text.replace(value, "***")
    for shape in _SHAPES.values():
        text = shape.sub("***", text)
    return text


def kind_of_secret(text: str) -> str | None:
    """What kind of secret ``text`` holds, in words; None where it holds none."""
    if any(value in text for value in _values()):
        return "the value of a secret environment variable"
    return next((kind for kind, shape in _SHAPES.items() if shape.search(text)), None)


def _values() -> list[str]:
    values = {value.strip() for name, value in os.environ.items() if _NAMES.search(name)}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
