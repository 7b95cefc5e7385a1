"""What makes an artifact this artifact: a document of plain values, hashed. No Prefect, no torch.

Only what changes the result belongs into the document; where and how a stage runs does not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

LENGTH = 32
"""Hex digits of a fingerprint: 128 bits of sha256."""


def stable(value: Any, where: str = "identity") -> Any:
    """``value`` as JSON that is the same in every process and on every machine.

    Raises:
        TypeError: the value has no stable form (a path, a set, NaN, an object); names where it was found.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
    elif isinstance(value, BaseModel):
        return {name: stable(getattr(value, name), f"{where}.{name}") for name in type(value).model_fields}
    elif isinstance(value, list | tuple):
        return [stable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where} has a key without a stable form: {odd[0]!r}")
        return {key: stable(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{where} has no stable form: {value!r} ({type(value).__name__}); pass plain values, and files by their digest"
    )


def fingerprint(document: Mapping[str, Any]) -> str:
    """sha256 of the document's canonical JSON, shortened to ``LENGTH`` hex digits."""
    text = json.dumps(stable(document), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def flattened(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys: ``{"config": {"lr": 1}}`` becomes ``{"config.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of everything in which two documents differ."""
    before, after = flattened(old), flattened(new)
    keys = dict.fromkeys([*after, *before])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
