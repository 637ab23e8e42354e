"""JSON objects from files: a key that stands twice is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import FormatError


def parse_object(file: Path, text: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in ``text``, which is called ``what`` in messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise FormatError(file, f"{what} has the key {twice!r} twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as wrong:
        if isinstance(wrong, FormatError):
            raise
        raise FormatError(file, f"{what} is not JSON: {wrong}") from None
    if not isinstance(value, dict):
        raise FormatError(file, f"{what} is not a JSON object")
    return value
