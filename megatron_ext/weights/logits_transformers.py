"""Worker job ``logits-transformers``: a Hugging Face folder's logits by transformers, weights in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_ext.errors import SourceError
from megatron_ext.events import Events
from megatron_ext.platforms.base import select
from megatron_ext.weights.hf import SHORT


def run(job: Any, events: Events) -> dict[str, Any]:
    """Inputs ``model`` and ``prompts``; config ``rounded`` and ``hidden``; writes ``answers.safetensors``."""
    platform = select(job.runtime.platform)
    model = _load(Path(job.inputs["model"]), job.config["rounded"]).to(platform.name)
    prompts = load_file(job.inputs["prompts"])
    answers: dict[str, torch.Tensor] = {}
    for name in sorted(key.removesuffix(".tokens") for key in prompts if key.endswith(".tokens")):
        tokens, positions = prompts[f"{name}.tokens"].to(platform.name), prompts[f"{name}.positions"]
        if job.config["hidden"]:
            _watch(model, positions, answers)
        with torch.no_grad():
            logits = model(tokens, use_cache=False, logits_to_keep=positions.to(platform.name)).logits
        if not job.config["hidden"]:
            answers[name] = logits.float().cpu().contiguous()
    save_file(answers, job.out / "answers.safetensors")
    return {"device": platform.device_name()}


def _load(folder: Path, rounded: str | None) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"transformers cannot load {folder}: {error}") from None
    if rounded:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(SHORT[rounded]))
    return model.eval()


def _watch(model: torch.nn.Module, positions: torch.Tensor, answers: dict[str, torch.Tensor]) -> None:
    """Keep what embedding, attention, layers and the final norm put out, (B, kept, H) each."""

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            answers[name] = hidden[:, positions.to(hidden.device)].float().cpu().contiguous()

        return hook

    trunk: Any = model.get_decoder()
    trunk.embed_tokens.register_forward_hook(keep("embedding"))
    for number, layer in enumerate(trunk.layers):
        layer.self_attn.register_forward_hook(keep(f"attention of layer {number}"))
        layer.register_forward_hook(keep(f"layer {number}"))
    trunk.norm.register_forward_hook(keep("final norm"))
