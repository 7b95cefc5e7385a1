"""The demo's base model: a small Qwen2 with random weights, and a tokenizer trained on the demo's corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 1024
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Newlines stand in expressions: transformers trims one that follows a block tag."""
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
"""About a million parameters with a vocabulary below a thousand: 2 cores train it in a minute or two. A narrow model
learns sooner from wider random weights than 0.02, which fits those a thousand wide."""


def write_tokenizer(folder: Path, corpus: Iterable[str]) -> None:
    """A byte-level BPE over the full byte alphabet (any text can be tokenised) with a ChatML template.

    The template marks the assistant's turns with ``{% generation %}``, so that transformers and the tokenize stage
    agree on what is trained.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=SIZES["max_position_embeddings"]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def write_model(folder: Path, seed: int) -> int:
    """Random weights in ``folder`` beside the tokenizer there; returns the number of parameters.

    The numbers come from NumPy: torch's normal_ differs with the processor's vector width.
    """
    import numpy
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
        **SIZES,
    )
    model = Qwen2ForCausalLM(config)
    rng = numpy.random.Generator(numpy.random.PCG64(seed))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                values = rng.standard_normal(tuple(parameter.shape), dtype=numpy.float32) * config.initializer_range
                parameter.copy_(torch.from_numpy(values))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return model.num_parameters()
