"""What a passed verification says: ``certificate.json`` inside the checkpoint or the exported folder. Torch-free."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from megatron_ext.config import Section
from megatron_ext.errors import CheckpointError

CERTIFICATE = "certificate.json"
PACKAGES = ("megatron-flows", "torch", "safetensors", "megatron-core", "transformers")


class LogitsFigures(Section):
    """How near the logits of two models came to each other; both computed with fp32 weights."""

    prompts: dict[str, tuple[int, int]] = Field(description="prompt -> (sequences, tokens in each)")
    positions: int = Field(description="tokens whose logits were compared")
    max_difference: float = Field(description="largest |Hugging Face - megatron-core|")
    max_logit: float = Field(description="largest |logit| of Hugging Face")
    tolerance: float = Field(description="largest difference that passes")
    top1_differs: int = Field(description="near-ties in which the two models prefer different tokens")
    precision: str
    device: str
    window_size: int | None = Field(default=None, description="sliding window; a prompt was longer")


class Certificate(Section):
    """A checkpoint and a Hugging Face folder hold the same model: what was compared, and how."""

    format: Literal["megatron-flows/certificate"] = "megatron-flows/certificate"
    version: Literal[1] = 1
    level: Literal["digest", "logits"]
    compared: str = Field(description="sentence: what equals what")
    dtype: str = Field(description="type in which the bits were compared")
    tensors: int = Field(description="Hugging Face tensors")
    megatron_tensors: int = Field(description="tensors of the checkpoint")
    bytes: int = Field(description="of the compared tensors, in the type compared")
    digests: dict[str, str] = Field(
        description="Hugging Face tensor -> xxh3-128 over its type, its shape and its bytes in the Hugging Face folder"
    )
    not_converted: tuple[str, ...] = Field(default=(), description="Hugging Face tensors that the config determines")
    logits: LogitsFigures | None = None
    seconds: float
    versions: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Everything but the digests of the single tensors."""
        return self.model_dump(exclude={"format", "version", "digests"}, exclude_none=True)


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Put it into the artifact that it speaks of."""
    (folder / CERTIFICATE).write_text(certificate.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_certificate(folder: Path) -> Certificate | None:
    """The certificate of a checkpoint or an exported folder; None if it was never verified.

    Raises:
        CheckpointError: there is one, and it is damaged; names the place in it.
    """
    path = folder / CERTIFICATE
    try:
        return Certificate.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = error.strerror
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    raise CheckpointError(f"{path} is no certificate: {problem}; make the folder again, or remove what lies there")


def facts(certificate: Certificate) -> dict[str, str]:
    """For a person: name -> value."""
    c = certificate
    told = {
        "compared": c.compared,
        "level": c.level,
        "tensors": f"{c.tensors:,} of Hugging Face, {c.megatron_tensors:,} of megatron-core",
        "bytes": f"{c.bytes:,}, bit for bit in {c.dtype}",
    }
    if c.not_converted:
        told["not converted"] = f"{len(c.not_converted):,} that config.json determines, first {c.not_converted[0]}"
    if c.logits:
        figures = c.logits
        shapes = (f"{name} {count} × {length}" for name, (count, length) in figures.prompts.items())
        told["prompts"] = ", ".join(shapes) + " tokens"
        told["logits"] = (
            f"differ by {figures.max_difference:.2g} at most, {figures.tolerance:.2g} passes "
            f"(largest logit {figures.max_logit:.3g}); {figures.positions:,} positions"
        )
        told["preferred token"] = f"differs in {figures.top1_differs} near-ties" if figures.top1_differs else "the same"
        told["computed in"] = f"{figures.precision} on {figures.device}"
    told["seconds"] = f"{c.seconds:.1f}"
    return told


def sentence(certificate: Certificate) -> str:
    """For a log: what was equal, in one line."""
    c = certificate
    told = f"{c.tensors:,} tensors, {c.bytes / 1e9:.3g} GB, equal bit for bit in {c.dtype}"
    if c.logits:
        told += f"; logits within {c.logits.max_difference:.2g} of {c.logits.max_logit:.3g}"
    return f"{told}; {c.seconds:.1f} s"


def versions() -> dict[str, str]:
    """Of the packages that have a say in what is compared."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
