"""Tokenizers and conversations for the tests of the data room; needs ``tokenizers`` only, not transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = ["What is the capital of France?", "The capital of France is Paris.", "user assistant system", "1 2 3"] * 4


def write_chat_tokenizer(folder: Path, kind: str = "bytes", vocab_size: int = 420, **config: Any) -> Path:
    """A Hugging Face tokenizer folder without a chat template, unless ``config`` brings one.

    ``kind``: "bytes" (GPT-2 like), "nfc" (the same after NFC, Qwen2 like), "metaspace" (Llama-2 like).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet: list[str] = []
    special = SPECIAL
    if kind == "metaspace":
        special = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "nfc":
            tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn, user first."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


TOOL = {
    "type": "function",
    "function": {"name": "search", "description": "Find", "parameters": {"type": "object", "properties": {}}},
}
TOOL_CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "find cats & dogs"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "search", "arguments": {"query": "cats"}}},
            {"type": "function", "function": {"name": "search", "arguments": {"query": "dogs"}}},
        ],
    },
    {"role": "tool", "content": '{"found": 3}'},
    {"role": "tool", "content": '{"found": 4}'},
    {"role": "assistant", "content": "three and four"},
]
CHATS = [
    chat("What is the capital of France?", "Paris."),
    chat("Hi", "Hello 🎉", "And 日本?", "東京 👩‍👩‍👧\n", system="Be brief."),
    chat("a", " leading and trailing \n\n", "b", "", "c", "<|im_end|> in the text"),
    chat("Paris.", "Paris.", "Paris.", "Paris.", "Paris.", "Paris."),
    chat("e\u0301 decomposed", "e\u0301ta\u0301t\u0301 decomposed e\u0301"),
    chat("one", "two", "three"),
]
