"""Errors that a user can mend: one base class, one class for each cause.

Each message names what was wrong, the value, the place and the remedy. The command line turns
``UserError`` into exit code 2 and one line; everything else is a crash (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MegatronFlowsError(Exception):
    """Base of every error that megatron-flows raises on purpose."""

    exit_code = 1


class UserError(MegatronFlowsError):
    """The input is at fault, not the program: exit code 2, nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe, a job file or a command-line value does not fit."""


class SourceError(UserError):
    """A file, folder or hub id is missing, unreadable or damaged."""


class UntrustedPickleError(UserError):
    """A pickle wants a function or class that could run a program; the remedy is ``--trust-pickle``."""


class UnsupportedModelError(UserError):
    """The Hugging Face config asks for something that no family declares."""


class WeightMappingError(UserError):
    """A weight without a rule, a rule without a weight, or a shape that contradicts the config."""


class CheckpointError(UserError):
    """A Megatron checkpoint folder is incomplete, damaged or of another model."""


class PrecisionError(UserError):
    """A weight is too large for the type that was asked for."""


class VerificationError(UserError):
    """Two models that must be the same are not; names tensor or layer. Nothing is published and nothing tried again.

    The command line says so with exit code 1, as ``cmp`` does; 2 means that they could not be compared.
    """

    exit_code = 1


class CheckpointChangedError(VerificationError):
    """A converted checkpoint no longer holds what was converted, by the digests of its certificate."""


class DatasetFormatError(UserError):
    """A row does not fit the dataset format; names file, row and field."""


class EmptyFileError(DatasetFormatError):
    """A data file holds no rows at all; with ``on_bad_row=skip`` it is passed over."""


class RowFormatError(DatasetFormatError):
    """One row does not fit; with ``on_bad_row=skip`` it is left out and counted.

    Args:
        source: the file, or its URL.
        row: number of the row in it.
        field: the field at fault, or None if it is the row as a whole.
        problem: what is wrong, as the end of the sentence.
    """

    def __init__(self, source: object, row: int, field: str | None, problem: str) -> None:
        place = f"{source}, row {row}:" + (f" field {field!r}" if field is not None else "")
        super().__init__(f"{place} {problem}")
        self.source, self.row, self.field, self.problem = str(source), row, field, problem

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """Cross the border of a process whole."""
        return type(self), (self.source, self.row, self.field, self.problem)


class ChatTemplateError(UserError):
    """A chat template is unknown or cannot be rendered."""


class VocabularyError(UserError):
    """Token ids, tokenizer and model vocabulary do not fit each other."""


class DiskSpaceError(UserError):
    """Too little room for what is about to be written."""


class OutputExistsError(UserError):
    """The output folder holds something that is not ours to replace."""


class EvaluationError(UserError):
    """A benchmark task is unknown or cannot be scored."""


class ParallelismError(UserError):
    """A combination of parallel sizes that cannot run."""


class PlatformError(UserError):
    """The accelerator asked for is not on this machine."""


class TrainingDivergedError(MegatronFlowsError):
    """The loss or the gradient norm became NaN or infinite."""


class WorkerFailedError(MegatronFlowsError):
    """A subprocess died; the message ends with the last lines of its log."""


class JobInterrupted(MegatronFlowsError):
    """The job was asked to stop and saved what it had, until ``step``."""

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


def unknown(kind: str, value: object, available: Iterable[str], remedy: str = "") -> str:
    """Sentence for an unknown name: ``unknown KIND 'x'; did you mean 'y'? Available: … (REMEDY)``."""
    names = sorted(available)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {value!r}; {hint}Available: {', '.join(names)}" + (f" ({remedy})" if remedy else "")
