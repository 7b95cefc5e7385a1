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


SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip
FAMILY_SIZES = {
    "mistral": {"sliding_window": None},
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32
    },
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}  # fmt: skip
"""What keeps a model of the family tiny, beside SIZES."""


def write_model(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: str = "float32",
    stacked_experts: bool = False,
    **overrides,
) -> Path:
    """A Hugging Face causal LM with weights large enough that logits differ, and a tokenizer beside it.

    ``stacked_experts`` writes experts as transformers 5 keeps them in memory, not one by one as it saves them.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    sizes = SIZES | FAMILY_SIZES.get(model_type, {}) | overrides
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.3)  # a router that sends tokens to different experts
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.mul_(4)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if stacked_experts:
        tied = config.tie_word_embeddings
        weights = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return write_tokenizer(folder)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """``rows`` as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
