"""A small sentencepiece model trained on the spot, alone in a Hugging Face folder, as Llama-2's and Mistral's are."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

TEXT = [
    "What is the capital of France? The capital of France is Paris, and Paris is large.",
    "Tell me about Beethoven; he wrote nine symphonies, and the ninth is the longest of them.",
    "user assistant system 1 2 3 hello there, how are you today? >= <= == are signs",
    "  two blanks at the start,  two in the middle\tand a tab",
] * 4


def write_sentencepiece(folder: Path, *, vocab_size: int = 340, model_type: str = "bpe", **config: Any) -> Path:
    """``folder`` with tokenizer.model, and tokenizer_config.json from ``config`` unless that is empty."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=vocab_size, model_type=model_type,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=1.0, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if config:
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        values = {"tokenizer_class": "LlamaTokenizer", **special, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder
