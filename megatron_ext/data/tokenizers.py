"""Tokenizers out of Hugging Face folders: tokenizer.json, a bare sentencepiece tokenizer.model, or the Python one.

A folder with tokenizer.json needs the ``tokenizers`` package alone. From a bare tokenizer.model, transformers builds
the fast tokenizer once; the result is kept in the cache, so later runs do not import transformers either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from megatron_ext.cache import kept
from megatron_ext.data.chat_templates import read_tokenizer_config
from megatron_ext.data.definition import Definition
from megatron_ext.errors import SourceError, VocabularyError
from megatron_ext.hf_folder import read_config, tokenizer_digest

if TYPE_CHECKING:
    from megatron_ext.data.slow_tokenizer import SlowTokenizer

FAST, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


def load_tokenizer(folder: Path, *, slow: bool = False) -> Tokenizer | SlowTokenizer:
    """The tokenizer of a Hugging Face folder, without the truncation and padding it may ask for.

    Args:
        folder: holds tokenizer.json or tokenizer.model.
        slow: take the Python tokenizer on sentencepiece, as transformers' ``use_fast=False`` did up to version 4.
            It needs tokenizer.model, and answers to the methods of ``Tokenizer`` that encoding uses.

    Raises:
        SourceError: no tokenizer is there, or it cannot be read.
        VocabularyError: tokenizer_config.json adds tokens that the tokenizer does not know.
    """
    if slow:
        from megatron_ext.data.slow_tokenizer import SlowTokenizer

        return SlowTokenizer.load(folder)
    tokenizer = read_tokenizer(tokenizer_file(folder))
    _require_added(folder, tokenizer.token_to_id)
    return tokenizer


def read_vocabulary(
    folder: Path, definition: Definition | None, load: Callable[[], Tokenizer | SlowTokenizer]
) -> dict[str, int]:
    """Id of every token of a folder's tokenizer, added ones included; ``load`` gives it where ``definition`` is silent.

    Raises:
        VocabularyError: as ``load_tokenizer``.
    """
    vocabulary = definition and definition.vocabulary
    if vocabulary is None:
        return load().get_vocab(with_added_tokens=True)
    _require_added(folder, vocabulary.get)
    return vocabulary


def _require_added(folder: Path, find: Callable[[str], int | None]) -> None:
    for number, token in (read_tokenizer_config(folder).get("added_tokens_decoder") or {}).items():
        if find(content := token["content"]) is None:
            raise VocabularyError(
                f"{folder}: tokenizer_config.json adds token {content!r} as id {number}, but tokenizer.json lacks it; "
                "save the tokenizer again with transformers' save_pretrained"
            )


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer.json of a Hugging Face folder: its own, or the one in the cache made from its tokenizer.model.

    Raises:
        SourceError: the folder has neither, or the tokenizer.model cannot be converted.
    """
    if (own := folder / FAST).is_file():
        return own
    if not (folder / SENTENCEPIECE).is_file():
        raise SourceError(
            f"{folder} has no tokenizer.json and no tokenizer.model, one of which tokenizing needs; make one with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    key = f"{tokenizer_digest(folder)}-{version('transformers')}-{version('tokenizers')}"
    return kept("tokenizers", key, lambda made: _convert(folder, made / FAST)) / FAST


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without truncation and padding.

    Raises:
        SourceError: it is not readable.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (tokenizers raises no narrower class)
        raise SourceError(f"{path} is not a readable tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_vocabulary(vocabulary: Mapping[str, int], folder: Path, extra_vocab_size: int = 0) -> int:
    """Refuse a tokenizer that can produce ids the model of the same folder has no embedding for.

    ``vocabulary`` is the tokenizer's; ``extra_vocab_size`` is how many rows the embedding gets in the conversion.

    Returns:
        The largest id.

    Raises:
        VocabularyError: names the token, its id and the model's vocab_size.
    """
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if (folder / "config.json").is_file():
        config = read_config(folder)
        rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        if isinstance(rows, int) and largest >= rows + extra_vocab_size:
            extra = f" + {extra_vocab_size} (extra_vocab_size)" if extra_vocab_size else ""
            raise VocabularyError(
                f"the tokenizer of {folder} has token {token!r} with id {largest}, but the model's vocab_size is "
                f"{rows} (config.json){extra}; use the tokenizer that the model was trained with, or give the model "
                f"rows for the new tokens with extra_vocab_size {largest + 1 - rows}"
            )
    return largest


def _convert(folder: Path, out: Path) -> None:
    """Build the fast tokenizer as transformers does for this folder; without any config, as for Llama."""
    require_sentencepiece(folder / SENTENCEPIECE)
    from transformers import AutoTokenizer, LlamaTokenizer
    from transformers.utils import logging

    described = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        made = (AutoTokenizer if described else LlamaTokenizer).from_pretrained(str(folder), local_files_only=True)
        backend = made.backend_tokenizer
    except (ValueError, KeyError, OSError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"transformers cannot make a fast tokenizer of {folder / SENTENCEPIECE}: {reason}") from None
    finally:
        logging.set_verbosity(verbosity)
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(out))


def require_sentencepiece(path: Path) -> Any:
    """The ``ModelProto`` in a sentencepiece model.

    Raises:
        SourceError: the file is missing, or is no such model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    except DecodeError:
        model = None
    if model is None or not model.pieces:
        raise SourceError(f"{path} is not a sentencepiece model; download the model again")
    return model


def sentencepiece_tokens(path: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token`` of a sentencepiece model, as far as it has them.

    Raises:
        SourceError: the file is no such model.
    """
    model = require_sentencepiece(path)
    spec, tokens = model.trainer_spec, {}
    for name in ("bos", "eos", "unk", "pad"):
        number, piece = getattr(spec, f"{name}_id"), getattr(spec, f"{name}_piece")
        if 0 <= number < len(model.pieces) and model.pieces[number].piece == piece:  # -1 means none
            tokens[f"{name}_token"] = piece
    return tokens
