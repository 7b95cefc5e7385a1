"""The receipt of an upcycling: how far its logits are from those of the dense model before any training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import UpcycleConfig, VerifyLevel
from megatron_ext.errors import ConfigError
from megatron_ext.events import Events
from megatron_ext.weights.certificate import LogitsFigures
from megatron_ext.weights.hf import SHORT, short_name
from megatron_ext.weights.manifest import read_manifest, write_manifest
from megatron_ext.weights.verify_logits import Pair, compare_logits, require_memory


def check_noise(upcycle: UpcycleConfig | None, verify: VerifyLevel) -> None:
    """Refuse to demand equal logits of experts that are meant to differ.

    Raises:
        ConfigError: names both.
    """
    if upcycle and upcycle.noise_std and verify == "logits":
        raise ConfigError(
            f"--verify logits cannot pass with noise_std {upcycle.noise_std}: the experts are meant to differ from the "
            "dense model; verify with digest (the receipt states how far the logits are)"
        )


def receipt(
    checkpoint: Path,
    model: Path,
    verified: dict[str, Any] | None,
    dtypes: Mapping[str, torch.dtype],
    events: Events,
    platform: str,
) -> dict[str, Any]:
    """Compare the upcycled ``checkpoint`` with the dense ``model``, both in fp32, and put it into the manifest.

    Without noise the difference must be within the tolerance of verification. ``verified`` is what verification found
    already, None if none was asked for: then nothing is compared; nor where the machine lacks the memory for it, which
    is told. ``dtypes`` are those of the checkpoint's tensors.

    Raises:
        VerificationError: the experts do not compute what the dense model computes; names the first layer.
    """
    manifest = read_manifest(checkpoint)
    changes = manifest.changes
    assert changes is not None
    assert changes.upcycle is not None
    if verified is None:
        return {"step_zero": None}
    if "logits" in verified:
        figures = LogitsFigures.model_validate(verified["logits"])
    else:
        try:
            require_memory(manifest.architecture, platform)
        except ConfigError as error:
            events.note(f"the logits before training were not compared with the dense model's: {error}")
            return {"step_zero": None}
        name = short_name(set(dtypes.values()))
        pair = Pair(checkpoint, model, manifest, "to_checkpoint", name if name in SHORT else None)
        figures = compare_logits(pair, events, platform, judged=not changes.upcycle.noise_std)
    kept = changes.model_copy(update={"step_zero": figures})
    write_manifest(checkpoint, manifest.model_copy(update={"changes": kept}))
    events.note(
        f"before training, the logits differ from the dense model's by {figures.max_difference:.2g} at most "
        f"(largest logit {figures.max_logit:.3g}, {figures.positions:,} positions)"
    )
    return {"step_zero": figures.model_dump()}
