"""Worker job ``logits-megatron``: a checkpoint's logits by the model that training builds, weights in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.events import Events
from megatron_ext.training.state import threads_of_process
from megatron_ext.weights.hf import SHORT
from megatron_ext.weights.manifest import CheckpointManifest


def run(job: Any, events: Events) -> dict[str, Any]:
    """Inputs ``checkpoint`` and ``prompts``; config ``manifest``, ``rounded``, ``hidden`` and ``trust_pickle``; writes
    ``answers.safetensors``.
    """
    from megatron_ext.training.parallel import parallel_state

    runtime = RuntimeConfig(platform=job.runtime.platform)
    train = TrainConfig(seq_length=4096, global_batch_size=1, train_iters=1, lr=1.0, precision="fp32")
    with parallel_state(runtime, train, threads_of_process(job.runtime)) as platform:
        model = _load(Path(job.inputs["checkpoint"]), train, runtime, platform, job.config)
        answers = _answers(model, load_file(job.inputs["prompts"]), job.config["hidden"])
        save_file(answers, job.out / "answers.safetensors")
        return {"device": platform.device_name()}


def _load(
    checkpoint: Path, train: TrainConfig, runtime: RuntimeConfig, platform: Any, asked: dict[str, Any]
) -> torch.nn.Module:
    from megatron_ext.model.provider import build_model
    from megatron_ext.training.checkpoints import load_weights
    from megatron_ext.weights.layouts import fill_model

    manifest = CheckpointManifest.model_validate(asked["manifest"])
    model = build_model(manifest.architecture, train, runtime, platform).eval()
    if manifest.layout == "mp_rank":
        fill_model(model, checkpoint, manifest, trust_pickle=asked["trust_pickle"])
    else:
        load_weights(model, checkpoint)
    if rounded := asked["rounded"]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(SHORT[rounded]))
    return model


def _answers(model: Any, prompts: dict[str, torch.Tensor], hidden: bool) -> dict[str, torch.Tensor]:
    answers: dict[str, torch.Tensor] = {}
    kept: list[torch.Tensor] = []  # of the prompt that is being computed
    model.output_layer.register_forward_pre_hook(lambda module, inputs: (inputs[0][kept[-1]], *inputs[1:]))
    if hidden:
        _watch(model, kept, answers)
    device = torch.cuda.current_device()
    for name in sorted(key.removesuffix(".tokens") for key in prompts if key.endswith(".tokens")):
        tokens = prompts[f"{name}.tokens"].to(device)
        kept.append(prompts[f"{name}.positions"].to(device))
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        with torch.no_grad():
            logits = model(tokens, positions, None)
        if not hidden:
            answers[name] = logits.float().cpu().contiguous()
    return answers


def _watch(model: Any, kept: list[torch.Tensor], answers: dict[str, torch.Tensor]) -> None:
    """Keep what embedding, attention, layers and the final norm put out, (T, B, H) -> (B, kept, H) each."""

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            whole, bias = output if isinstance(output, tuple) else (output, None)
            whole = whole if bias is None or name.startswith("layer") else whole + bias
            answers[name] = whole[kept[-1]].transpose(0, 1).float().cpu().contiguous()

        return hook

    model.embedding.register_forward_hook(keep("embedding"))
    for number, layer in enumerate(model.decoder.layers):
        layer.self_attention.register_forward_hook(keep(f"attention of layer {number}"))
        layer.register_forward_hook(keep(f"layer {number}"))
    model.decoder.final_layernorm.register_forward_hook(keep("final norm"))
