"""Typed pointers to artifacts: kind and fingerprint, never a path. This is what stages hand on and Prefect records.

A pointer looks its artifact up when it is made, so a record of an artifact that is gone or damaged does not load,
and Prefect then runs the stage again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from tasks.build import Input
from tasks.store import Manifest, Store


class Artifact(BaseModel):
    """Base of all pointers."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    fingerprint: str

    @model_validator(mode="after")
    def _is_in_the_store(self) -> Self:
        if Store.current().look_up(self.kind, self.fingerprint) is None:
            raise ValueError(f"{self.kind}/{self.fingerprint} is not in {Store.current().root}, or is damaged")
        return self

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The pointer to an artifact whose manifest was just read and checked."""
        return cls.model_construct(fingerprint=manifest.fingerprint, **manifest.pointer)

    @property
    def folder(self) -> Path:
        """Where the artifact lies in the current store."""
        return Store.current().folder(self.kind, self.fingerprint)

    @property
    def whole(self) -> Input:
        """The artifact as another stage's input."""
        return Input(self.fingerprint, lambda: str(self.folder), f"{self.kind}/{self.fingerprint}")


class Verified(Artifact):
    """An artifact that had to pass a check; another level of checking makes another artifact of the same content."""

    content: str

    @property
    def whole(self) -> Input:
        """The artifact as another stage's input: what is made of it stays, however strictly it was checked."""
        return Input(self.content, lambda: str(self.folder), f"{self.kind}/{self.fingerprint}")


class Sources(Artifact):
    """The pinned model, data files and benchmark tasks; each later stage depends on the part it reads."""

    kind: ClassVar[str] = "sources"
    model_digest: str
    tokenizer_digest: str
    data_digests: tuple[str, ...] = ()
    data_blend: tuple[tuple[float, str], ...] = ()
    """Of each data file its weight, and which entry of the recipe named it."""
    validation_digests: tuple[str, ...] = ()
    validation_blend: tuple[tuple[float, str], ...] = ()
    tasks_digest: str | None = None

    @property
    def model(self) -> Input:
        """The Hugging Face folder: config, weights, tokenizer."""
        return self._part(self.model_digest, "model", lambda: str(self.folder / "model"), "model.path")

    @property
    def tokenizer(self) -> Input:
        """The same folder for a stage that reads only the tokenizer in it."""
        name = "the tokenizer in model.path"
        return self._part(self.tokenizer_digest, "model", lambda: str(self.folder / "model"), name)

    @property
    def data(self) -> Input:
        """The data files, in the recipe's order."""
        return self._rows(self.data_digests, "data", "data.files")

    @property
    def validation(self) -> Input | None:
        """The files of the validation set, if the recipe names any."""
        if not self.validation_digests:
            return None
        return self._rows(self.validation_digests, "validation", "data.validation_files")

    @property
    def tasks(self) -> Input | None:
        """Folder of local benchmark tasks, if the recipe names one."""
        if self.tasks_digest is None:
            return None
        return self._part(self.tasks_digest, "tasks", lambda: str(self.folder / "tasks"), "evaluate.include_path")

    def _rows(self, digests: tuple[str, ...], part: str, name: str) -> Input:
        def files() -> list[str]:
            folders = sorted((self.folder / part).iterdir(), key=lambda p: int(p.name))
            return [_place_or_url(file) for folder in folders for file in folder.iterdir()]

        return self._part(list(digests), part, files, name)

    def _part(self, identity: Any, part: str, locate: Callable[[], Any], name: str) -> Input:
        return Input(identity, locate, name, lambda: Store.current().link_faults(self.kind, self.fingerprint, part))


def _place_or_url(file: Path) -> str:
    """A link's own path; of a file on a server its URL, which the file with that suffix holds."""
    is_url = file.suffix == ".url" and not file.is_symlink()
    return file.read_text(encoding="utf-8") if is_url else str(file)


class Demo(Artifact):
    """A generated model, data set and benchmark."""

    kind: ClassVar[str] = "demos"


class McoreCheckpoint(Verified):
    """A torch_dist checkpoint made from a Hugging Face model."""

    kind: ClassVar[str] = "checkpoints"


class IdxmapDataset(Artifact):
    """Token ids and loss masks as idxmaps."""

    kind: ClassVar[str] = "datasets"


class References(Artifact):
    """Log-probabilities of both answers of every pair, as the model gave them before training."""

    kind: ClassVar[str] = "references"


class Training(Artifact):
    """A trained checkpoint with its metrics and TensorBoard files."""

    kind: ClassVar[str] = "trainings"


class HFModel(Verified):
    """An exported Hugging Face folder."""

    kind: ClassVar[str] = "models"


class EvalReport(Artifact):
    """Scores of one model: ``results.json`` and ``samples.jsonl``."""

    kind: ClassVar[str] = "evaluations"

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Task -> metric -> value."""
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))["tasks"]


class Report(Artifact):
    """One self-contained HTML file."""

    kind: ClassVar[str] = "reports"

    @property
    def path(self) -> Path:
        """The HTML file."""
        return next(iter(sorted(self.folder.glob("*.html"))))
