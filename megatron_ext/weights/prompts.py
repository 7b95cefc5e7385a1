"""Prompts on which two models are compared: the same for one architecture and tokenizer, wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.families.base import Architecture

SEED = 20240
SHORT, LONG = 64, 384
BEYOND = 256
"""Tokens by which a prompt is longer than the sliding window."""
KEPT = 160
"""Positions of a long prompt whose logits are compared: the last ones, and some spread over the rest."""
TEXTS = (
    "What is the capital of France? The capital of France is Paris, and it has been for a long time.\n",
    "def mean(values):\n    return sum(values) / len(values)  # 3.14159, 2,718 and 1e-5\n",
    "人工智能正在改变世界。Größe, café, naïve, мир, 🙂\n",
)


@dataclass(frozen=True)
class Prompt:
    """(B, T) tokens, and the positions whose logits are kept, ascending."""

    name: str
    tokens: torch.Tensor
    positions: torch.Tensor


def make_prompts(architecture: Architecture, model: Path) -> list[Prompt]:
    """Random tokens, tokens from all over the vocabulary, text if the folder has a tokenizer.json, and one long prompt:
    256 tokens longer than the sliding window, if there is one.
    """
    vocabulary, most = architecture.vocab_size, architecture.max_position_embeddings
    generator = torch.Generator().manual_seed(SEED)

    def random(sequences: int, length: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (sequences, min(length, most)), generator=generator)

    spread = torch.linspace(0, vocabulary - 1, min(2 * SHORT, most)).round().long()
    window = architecture.window_size
    prompts = [
        _whole("random", random(2, SHORT)),
        _whole("whole vocabulary", spread[torch.randperm(len(spread), generator=generator)][None]),
        _long("beyond the window", random(1, window + BEYOND)) if window else _long("long", random(1, LONG)),
    ]
    if (text := _text(model, vocabulary, most)) is not None:
        prompts.append(_whole("text", text))
    return prompts


def _whole(name: str, tokens: torch.Tensor) -> Prompt:
    return Prompt(name, tokens, torch.arange(tokens.shape[1]))


def _long(name: str, tokens: torch.Tensor) -> Prompt:
    length = tokens.shape[1]
    if length <= KEPT:
        return _whole(name, tokens)
    last = torch.arange(length - KEPT // 2, length)
    rest = torch.linspace(0, length - KEPT // 2 - 1, KEPT // 2).round().long()
    return Prompt(name, tokens, torch.cat([rest, last]))


def _text(model: Path, vocabulary: int, most: int) -> torch.Tensor | None:
    path = model / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    ids = [i for text in TEXTS for i in Tokenizer.from_file(str(path)).encode(text).ids if i < vocabulary]
    return torch.tensor([ids[: min(2 * SHORT, most)]]) if ids else None
