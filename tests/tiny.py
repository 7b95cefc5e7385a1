"""Tiny real models and tokenizers for tests: random weights through transformers, BPE trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["What is the capital of France?", "The capital of France is Paris.", "Tell me about Beethoven.", "1 2 3"] * 4


def write_tokenizer(folder: Path, vocab_size: int = 400, corpus: list[str] | None = None) -> Path:
    """A byte-level BPE tokenizer with ChatML markers, in Hugging Face's files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus or CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def write_model(folder: Path, model_type: str = "llama", seed: int = 0, dtype: str = "float32", **overrides) -> Path:
    """A Hugging Face causal LM with weights large enough that logits differ, and a tokenizer beside it."""
    import torch
    import transformers

    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **(sizes | overrides))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.mul_(4)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return write_tokenizer(folder)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """``rows`` as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
