"""Where a recipe's inputs come from: local folders and files, hub ids, demo://NAME; each with a content digest.

Resolving reads and checks, it writes nothing but the digests' memo (and downloads, for a hub id, into Hugging Face's
cache). A missing or unusable source ends here, before anything runs.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from urllib.parse import parse_qs, urlsplit

import xxhash

import megatron_ext.demo
from megatron_ext.config import DataConfig, EvalConfig, ModelConfig
from megatron_ext.data.source_facts import remote_digest
from megatron_ext.data.sources import Source, expand
from megatron_ext.errors import ConfigError, SourceError, unknown
from megatron_ext.families import find_family
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.hf_folder import TOKENIZER_FILES, read_config, weight_files, weights_index
from megatron_ext.weights.certificate import CERTIFICATE
from tasks.digests import SourceDigests
from tasks.store import Store

DEMO = "demo://"
URL_SUFFIX = ".url"
"""Behind the name of a data file that lies on a server; the file in the artifact holds its URL."""
MODEL_SUFFIXES = (".json", ".model", ".jinja", ".txt", ".tiktoken")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class DemoName:
    """``demo://NAME?seed=N``, or, of its data, ``demo://NAME/DATA?seed=N``."""

    name: str
    seed: int
    data: str = "data"
    """Folder of the rows that are meant, where data is meant."""

    @property
    def url(self) -> str:
        """How a recipe writes it."""
        data = "" if self.data == "data" else f"/{self.data}"
        return f"{DEMO}{self.name}{data}?seed={self.seed}"

    @property
    def identity(self) -> dict[str, str | int]:
        """What decides the demo's bytes: its name, its seed and the code that makes it."""
        return {"demo": self.name, "seed": self.seed, "code": _code_digest(Path(megatron_ext.demo.__file__).parent)}


@dataclass(frozen=True)
class Files:
    """Files of the user's: name inside the artifact -> where it lies, and its digest.

    ``url`` is set where the only file lies on a server; then it has no place here. ``weight`` and ``given`` say how
    data files are blended: what stands before the path in the recipe, and which of its entries named the file.
    """

    places: Mapping[str, Path]
    digests: Mapping[str, str]
    origin: str
    url: str | None = None
    weight: float | None = None
    given: str = ""


def demo_name(text: str, kinds: Iterable[str] = ("data",)) -> DemoName | None:
    """The demo that ``text`` names; None when it is not of the form ``demo://``. ``kinds`` of data may be named, too.

    Raises:
        ConfigError: no such demo or data, or an unknown option.
    """
    if not text.startswith(DEMO):
        return None
    parts = urlsplit(text)
    if parts.netloc not in megatron_ext.demo.DEMOS:
        raise ConfigError(unknown("demo", parts.netloc, megatron_ext.demo.DEMOS) + f" (value: {text})")
    data = parts.path.strip("/") or "data"
    if data not in kinds:
        raise ConfigError(unknown("data of a demo", data, kinds) + f" (value: {text})")
    options = parse_qs(parts.query)
    seed = options.pop("seed", ["1"])[-1]
    if options or not seed.isdigit():
        raise ConfigError(f"{text}: the only option of a demo is ?seed=NUMBER")
    return DemoName(parts.netloc, int(seed), data)


def model_source(model: ModelConfig, digests: SourceDigests, *, download: bool = True) -> DemoName | Files:
    """The files of a Hugging Face model: config, weights, tokenizer; nothing else that lies in its folder.

    Raises:
        SourceError: no such folder, or it lacks config.json, weights or a tokenizer; a hub id that cannot be reached.
        UnsupportedModelError: no family converts this model.
    """
    if demo := demo_name(model.path):
        return demo
    folder = Path(model.path).expanduser()
    origin = str(folder.absolute())
    if not folder.is_dir():
        folder, origin = _from_hub(model, download)
    config = read_config(folder)
    read_architecture(find_family(str(config.get("model_type"))), config)
    if not any((folder / name).exists() for name in TOKENIZER_FILES[:2]):
        raise SourceError(f"{origin} has no tokenizer.json; save the model's tokenizer there")
    names = [p.name for p in folder.iterdir() if p.suffix in MODEL_SUFFIXES and p.is_file() and p.name != CERTIFICATE]
    index = weights_index(folder)
    names = [n for n in names if (index and n == index.name) or not n.endswith(".index.json")]
    names += [p.name for p in weight_files(folder)]
    return _files({name: folder / name for name in sorted(names)}, origin, digests)


def data_source(data: DataConfig, digests: SourceDigests) -> list[DemoName | Files]:
    """One entry for each file that ``data.files`` means, in order: globs and folders sorted by path.

    Raises:
        SourceError: a file is missing or of no supported kind, nothing matches, or a server does not say what
            identifies its file.
    """
    return _data_files("data.files", data.files, digests)


def validation_source(
    data: DataConfig, digests: SourceDigests, training: Iterable[DemoName | Files]
) -> list[DemoName | Files]:
    """The same for ``data.validation_files``, beside what ``data_source`` found to train on.

    Raises:
        SourceError: as ``data_source``; or the same bytes are trained on.
    """
    found = _data_files("data.validation_files", data.validation_files, digests)
    trained = {content: _called(part) for part in training for content in _contents(part)}
    for part in found:
        if twin := next((trained[content] for content in _contents(part) if content in trained), None):
            same = "is" if twin == _called(part) else f"holds the same bytes as {twin}, which is"
            raise SourceError(
                f"data.validation_files: {_called(part)} {same} in data.files, too; take it out of one of them"
            )
    return found


def _called(part: DemoName | Files) -> str:
    return part.origin if isinstance(part, Files) else part.url


def _contents(part: DemoName | Files) -> list[str]:
    return list(part.digests.values()) if isinstance(part, Files) else [part.url]


def _data_files(key: str, given: Iterable[str], digests: SourceDigests) -> list[DemoName | Files]:
    found: list[DemoName | Files] = []
    for number, text in enumerate(given):
        if demo := demo_name(text, megatron_ext.demo.DATA):
            found.append(demo)
            continue
        try:
            sources = expand([os.path.expanduser(text)])
        except SourceError as error:
            raise SourceError(f"{key}: {error}") from None
        found += [_data_file(source, number, digests) for source in sources]
    _require_distinct(key, found)
    return found


def _data_file(source: Source, number: int, digests: SourceDigests) -> Files:
    given = f"{number + 1}: {PurePath(source.input).name}"
    if source.is_url:
        known = {f"{source.name}{URL_SUFFIX}": remote_digest(source)}
        return Files({}, known, source.path, source.path, source.weight, given)
    path = Path(source.path)
    return replace(_files({path.name: path}, str(path.absolute()), digests), weight=source.weight, given=given)


def _require_distinct(key: str, found: list[DemoName | Files]) -> None:
    files = [part for part in found if isinstance(part, Files)]
    origins = [part.url or os.path.realpath(part.origin) for part in files]
    if twice := next((origin for origin in origins if origins.count(origin) > 1), None):
        raise SourceError(f"{key}: {twice} is named twice; name it once, with a weight if it should count more")


def tasks_source(evaluate: EvalConfig, digests: SourceDigests) -> DemoName | Files | None:
    """Everything in the folder of local benchmark tasks; None when the recipe names none.

    Raises:
        SourceError: no such folder, or no YAML file in it.
    """
    if evaluate.include_path is None:
        return None
    if demo := demo_name(evaluate.include_path):
        return demo
    folder = Path(evaluate.include_path).expanduser()
    if not folder.is_dir():
        raise SourceError(f"evaluate.include_path: {folder.absolute()} is not a folder; name one with task YAML files")
    paths = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and _wanted(p, folder)}
    if not any(name.endswith((".yaml", ".yml")) for name in paths):
        raise SourceError(f"evaluate.include_path: {folder.absolute()} holds no task YAML files")
    return _files(paths, str(folder.absolute()), digests)


def content_digest(digests: Mapping[str, str]) -> str:
    """One digest of several files: their names and contents, in the names' order."""
    return xxhash.xxh3_128("".join(f"{name}:{digests[name]};" for name in sorted(digests)).encode()).hexdigest()


def tokenizer_digest(digests: Mapping[str, str]) -> str:
    """The digest of the tokenizer's files among a model's; equals ``megatron_ext.hf_folder.tokenizer_digest``."""
    lines = (f"{name}:{digests[name]};" for name in TOKENIZER_FILES if name in digests)
    return xxhash.xxh3_128("".join(lines).encode()).hexdigest()


def source_digests() -> SourceDigests:
    """The memo of the current store."""
    return SourceDigests(Store.current().root)


def _files(places: Mapping[str, Path], origin: str, digests: SourceDigests) -> Files:
    absolute = {name: path.absolute() for name, path in places.items()}
    return Files(absolute, {name: _digest(path, digests) for name, path in absolute.items()}, origin)


def _digest(path: Path, digests: SourceDigests) -> str:
    try:
        return digests.digest(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}; make it readable or leave it out") from None


def _wanted(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return "__pycache__" not in parts and not any(part.startswith(".") for part in parts)


def _code_digest(package: Path) -> str:
    sources: Iterable[Path] = sorted(package.glob("*.py"))
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sources)).hexdigest()[:16]


def _from_hub(model: ModelConfig, download: bool) -> tuple[Path, str]:
    local = Path(model.path).expanduser()
    if local.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") != 1:
        raise SourceError(f"model.path: {model.path} is not a folder (looked at {local.absolute()}); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    reason = "this machine is set offline (HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
    if not download:
        reason = "nothing was downloaded now (mflow run does that)"
    try:
        folder = Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=HUB_PATTERNS,
                local_files_only=offline or not download,
            )
        )
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, RepositoryNotFoundError):
            raise SourceError(f"model.path: {model.path} is neither a folder here nor a model on the hub") from None
        raise SourceError(
            f"model.path: {model.path} is not a folder here ({local.absolute()}), and as a hub id it is not in the "
            f"local cache while {reason}; give a local Hugging Face folder, or download it where there is a network"
        ) from None
    except HFValidationError as error:
        raise SourceError(f"model.path: {model.path} is neither a folder nor a hub id: {error}") from None
    return folder, f"{model.path}@{folder.name if COMMIT.fullmatch(folder.name) else model.revision}"
