"""Configuration from files and command lines: YAML, overrides, and faults told as one sentence each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_ext.errors import ConfigError

C = TypeVar("C", bound=BaseModel)


def validated(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """``cls`` from plain values; every fault becomes one ``ConfigError`` line that names key, value and ``where``."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(cls, e) for e in error.errors()) + f" (in {where})") from None


def _sentence(cls: type[BaseModel], error: Any) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = sorted(_fields_at(cls, path[:-1]))
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}; {hint}Available: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = json.dumps(error["input"], default=str)
    value = f" (value: {shown})" if len(shown) < 80 else ""
    return f"{key or 'configuration'}: {message[0].lower()}{message[1:]}{value}"


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = cls.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        cls = annotation
    return list(cls.model_fields)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else than a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping of sections")
    return values


def with_overrides(values: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of ``values`` with each ``a.b=c`` applied; ``c`` is read as YAML (JSON included).

    YAML 1.1 takes ``1e-4`` for a string; pydantic turns it into a number where a number belongs.
    Giving one of train_iters, train_epochs, train_tokens replaces whichever of them the recipe gave.
    """
    result = json.loads(json.dumps(values, default=str))
    lengths = ("train_iters", "train_epochs", "train_tokens")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"--set {override!r}: the value is not valid YAML: {why}") from None
        *sections, name = key.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
        if name in lengths and value is not None:
            for other in lengths:
                target.pop(other, None)
        target[name] = value
    return result
