"""Which chat template renders the conversations: the model's own, a named one, or a Jinja file.

A named template is one file in ``templates/``: put NAME.jinja there, with ``{% generation %}`` around what the
assistant writes (end marker included), and it is known everywhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_ext.errors import ChatTemplateError, SourceError, unknown

FOLDER = Path(__file__).with_name("templates")
OWN = "own"
"""Name, in manifests, of the template that came with the model."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TemplateSource:
    """A chat template before it is compiled: ``name`` for people, ``text`` in Jinja."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """xxh3-128 of the text."""
        return xxhash.xxh3_128_hexdigest(self.text.encode())


def named_templates() -> dict[str, Path]:
    """Name -> file of every template that comes with megatron-flows."""
    return {path.name.removesuffix(".jinja"): path for path in sorted(FOLDER.glob("*.jinja"))}


def find_template(name: str | None, tokenizer_folder: Path) -> TemplateSource:
    """The template that ``name`` means for the model in ``tokenizer_folder``.

    Args:
        name: None for the model's own, a name of ``named_templates()``, a name among the model's own templates
            (some models bring several), or the path of a Jinja file.

    Raises:
        ChatTemplateError: unknown name (with the nearest and all known ones), unreadable file, or the model has
            no template of its own and none was named.
    """
    own = _own_templates(tokenizer_folder)
    known = named_templates()
    if name is None:
        if OWN in own:
            return TemplateSource(OWN, own[OWN])
        have = f"; it has {', '.join(own)}, name one of them" if own else ""
        raise ChatTemplateError(
            f"model {tokenizer_folder} has no chat template of its own{have}; name one with --chat-template or "
            f"data.chat_template. Available: {', '.join(known)}, or the path of a Jinja file"
        )
    if name in known:
        return TemplateSource(name, known[name].read_text(encoding="utf-8"))
    if name in own:
        return TemplateSource(name, own[name])
    path = Path(name)
    if path.suffix in (".jinja", ".jinja2", ".j2") or path.is_file():
        try:
            return TemplateSource(path.name, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ChatTemplateError(f"cannot read chat template {path}: {reason}") from None
    remedy = "or give the path of a Jinja file; add one in megatron_ext/data/templates/, see chat_templates.py"
    raise ChatTemplateError(unknown("chat template", name, {*known, *own} - {OWN}, remedy))


def own_template(tokenizer_folder: Path) -> str | None:
    """The model's default chat template, if it has one.

    Raises:
        SourceError: a file of the tokenizer is damaged.
    """
    return _own_templates(tokenizer_folder).get(OWN)


def chat_template_identity(name: str | None, tokenizer_folder: Path) -> str:
    """Digest of the template that would be used: equal wherever it lies and whatever it is called.

    Cheap and torch-free. Raises what ``find_template`` raises.
    """
    return find_template(name, tokenizer_folder).digest


def read_tokenizer_config(tokenizer_folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json, or {} where there is none.

    Raises:
        SourceError: it is not a JSON object.
    """
    return _read_object(tokenizer_folder / "tokenizer_config.json")


def special_tokens(tokenizer_folder: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token``, … as text, as far as the tokenizer's files name them.

    What they do not speak of is, in a folder with a sentencepiece model and no tokenizer.json, what the model says.

    Raises:
        SourceError: a file of the tokenizer is damaged.
    """
    tokens: dict[str, str] = {}
    named: set[str] = set()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _read_object(tokenizer_folder / name)
        for key in SPECIAL_TOKENS:
            value = values.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[key] = value
        named |= values.keys()
    model = tokenizer_folder / "tokenizer.model"
    if model.is_file() and not (tokenizer_folder / "tokenizer.json").is_file():
        from megatron_ext.data.tokenizers import sentencepiece_tokens

        tokens = {k: token for k, token in sentencepiece_tokens(model).items() if k not in named} | tokens
    return tokens


def _own_templates(folder: Path) -> dict[str, str]:
    """Templates that came with the model, the default one under ``OWN``. The Jinja file wins, as in transformers."""
    own: dict[str, str] = {}
    value = read_tokenizer_config(folder).get("chat_template")
    if isinstance(value, str):
        own[OWN] = value
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                name = str(entry.get("name"))
                own[OWN if name == "default" else name] = entry["template"]
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        own[path.stem] = path.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        own[OWN] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return own


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}; download the model again") from None
    if not isinstance(values, dict):
        raise SourceError(f"{path} does not hold a JSON object; download the model again")
    return values
