"""What a stage hands to the machinery: which job, with which inputs, and what of it makes the result what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.config import RuntimeConfig
from tasks.identity import fingerprint, stable
from tasks.store import Link


@dataclass(frozen=True)
class Input:
    """Something a stage reads."""

    identity: Any
    """What of it is hashed: the narrowest content that the stage depends on."""
    locate: Callable[[], Any]
    """Gives the path, or list of paths, that the job reads; called when the job starts."""
    name: str
    """What a person calls it: a key of the recipe, or ``kind/fingerprint`` of an artifact."""
    changes: Callable[[], list[str]] = list
    """Says what of it is no longer what ``identity`` stands for: a user's file may change while a job reads it."""


@dataclass(frozen=True)
class Made:
    """What a stage without a single job made: its summary, its pointer's further fields, its links to user files."""

    summary: dict[str, Any]
    pointer: dict[str, Any]
    links: dict[str, Link]


@dataclass(frozen=True)
class Build:
    """One artifact to be: ``identity`` (sections of the recipe) and ``inputs`` are hashed, nothing else is."""

    identity: Mapping[str, Any]
    inputs: Mapping[str, Input | None]
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    job: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """The job's configuration."""
    make: Callable[[Path], Made] | None = None
    """Fills the partial folder instead of a job."""
    planned: Mapping[str, Any] = field(default_factory=dict)
    """The pointer's further fields as far as they are known before it is built."""
    checks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Knobs, by section of the recipe, that say what the artifact must pass. They are hashed, because its certificate
    is part of it, but what is made of the artifact does not depend on them."""

    def document(self, stage: str, version: int) -> dict[str, Any]:
        """The identity in the clear; kept in the manifest so that a later run can say what changed."""
        config = dict(self.identity)
        for section, knobs in self.checks.items():
            config[section] = {**config.get(section, {}), **knobs}
        return self._document(stage, version, config)

    def fingerprint(self, stage: str, version: int) -> str:
        """Hash of the document."""
        return fingerprint(self.document(stage, version))

    def content(self, stage: str, version: int) -> str:
        """Hash of the document without the checks: what the artifact holds, whatever it had to pass."""
        return fingerprint(self._document(stage, version, self.identity))

    def pointer(self, stage: str, version: int) -> dict[str, Any]:
        """The pointer's further fields as they are known now."""
        return {**self.planned, **({"content": self.content(stage, version)} if self.checks else {})}

    def _document(self, stage: str, version: int, config: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {role: given.identity for role, given in self.inputs.items() if given is not None}
        return stable({"stage": stage, "version": version, "config": config, "inputs": inputs})

    def located(self) -> dict[str, Any]:
        """Role -> absolute path (or list of paths), for the job."""
        return {role: given.locate() for role, given in self.inputs.items() if given is not None}

    def named(self) -> dict[str, Any]:
        """Role -> what a person calls the input, for the manifest."""
        return {role: given.name for role, given in self.inputs.items() if given is not None}

    def changes(self) -> list[str]:
        """Which inputs are no longer what was hashed."""
        return [change for given in self.inputs.values() if given is not None for change in given.changes()]
