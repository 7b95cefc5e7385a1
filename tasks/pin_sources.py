"""Stage pin-sources: the model, the data and the benchmark tasks become one content-addressed artifact of links."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ext.config import DataConfig, EvalConfig, ModelConfig
from tasks.artifacts import Demo, Sources
from tasks.build import Build, Made
from tasks.sources import (
    DemoName,
    Files,
    content_digest,
    data_source,
    model_source,
    source_digests,
    tasks_source,
    tokenizer_digest,
    validation_source,
)
from tasks.stage import Spec, produce, stage
from tasks.store import Link, Manifest, Store

MAKE_DEMO = Spec("make-demo", 1, Demo)
TRAINING, VALIDATION = "data/", "validation/"
"""Before the number of each data file among the parts."""


@stage("pin-sources", version=2, makes=Sources)
def pin_sources(model: ModelConfig, data: DataConfig | None = None, evaluate: EvalConfig | None = None) -> Build:
    """Check and digest what the recipe starts from, and link it: a moved copy of the same bytes is the same source.

    Raises:
        SourceError: a file, folder or hub id is missing or unreadable; names it.
        UnsupportedModelError: no family converts the model.
    """
    digests = source_digests()
    parts: dict[str, DemoName | Files] = {"model": model_source(model, digests)}
    training = data_source(data, digests) if data else []
    parts |= {f"{TRAINING}{number}": source for number, source in enumerate(training)}
    validation = validation_source(data, digests, training) if data else []
    parts |= {f"{VALIDATION}{number}": source for number, source in enumerate(validation)}
    if evaluate and (found := tasks_source(evaluate, digests)):
        parts["tasks"] = found
    identity = {name: _identity(part) for name, part in parts.items()}
    return Build(identity=identity, inputs={}, make=lambda partial: _pin(parts, partial), planned=_digests(parts))


def _identity(part: DemoName | Files) -> object:
    if isinstance(part, DemoName):
        return part.identity | ({"data": part.data} if part.data != "data" else {})
    return content_digest(part.digests)


def _pin(parts: dict[str, DemoName | Files], partial: Path) -> Made:
    links: dict[str, Link] = {}
    for name, part in parts.items():
        files = _demo_files(part, name, make=True) if isinstance(part, DemoName) else part
        assert files is not None
        if files.url is not None:
            (place,) = (partial / name / file for file in files.digests)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(files.url, encoding="utf-8")
        for file, place in files.places.items():
            path = partial / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            generated = isinstance(part, DemoName)
            path.symlink_to(os.path.relpath(place, path.parent) if generated else place)
            stat = place.stat()
            links[f"{name}/{file}"] = Link(
                target=str(path.readlink()),
                size=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                inode=stat.st_ino,
                digest=files.digests[file],
            )
    origins = {name: part.origin if isinstance(part, Files) else part.url for name, part in parts.items()}
    pointer = _digests(parts)
    return Made(summary={"origins": origins, "files": len(links)}, pointer=pointer, links=links)


def _digests(parts: dict[str, DemoName | Files]) -> dict[str, object]:
    """The further fields of the pointer; for a demo that is not made yet they are its identity, in words."""

    def digested(name: str) -> dict[str, str]:
        part = parts[name]
        if isinstance(part, Files):
            return dict(part.digests)
        made = _demo_files(part, name)
        return dict(made.digests) if made else {"tokenizer.json": f"{part.url} {name}"}

    def rows(folder: str) -> tuple[str, ...]:
        return tuple(digest for name in parts if name.startswith(folder) for digest in digested(name).values())

    def blend(folder: str) -> tuple[tuple[float | None, str], ...]:
        return tuple(_blended(part) for name, part in parts.items() if name.startswith(folder))

    return {
        "model_digest": content_digest(digested("model")),
        "tokenizer_digest": tokenizer_digest(digested("model")),
        "data_digests": rows(TRAINING),
        "data_blend": blend(TRAINING),
        "validation_digests": rows(VALIDATION),
        "validation_blend": blend(VALIDATION),
        "tasks_digest": content_digest(digested("tasks")) if "tasks" in parts else None,
    }


def _blended(part: DemoName | Files) -> tuple[float | None, str]:
    """Weight of a data file, if it was given one, and which entry of the recipe named it."""
    return (part.weight, part.given) if isinstance(part, Files) else (None, part.url)


def _demo_files(demo: DemoName, part: str, *, make: bool = False) -> Files | None:
    """The files of one part of a demo, out of the store; None when it is not made and ``make`` is not given."""
    store = Store.current()
    build = Build(identity=demo.identity, inputs={}, job="demo", config={"name": demo.name, "seed": demo.seed})
    fingerprint = build.fingerprint(MAKE_DEMO.identity, MAKE_DEMO.version)
    manifest = produce(MAKE_DEMO, build)[0] if make else store.look_up(Demo.kind, fingerprint)
    folder = demo.data if part.startswith((TRAINING, VALIDATION)) else part
    return _part_of(manifest, folder) if manifest else None


def _part_of(manifest: Manifest, part: str) -> Files:
    folder = Store.current().folder(manifest.kind, manifest.fingerprint)
    names = [name for name in manifest.files if name.startswith(f"{part}/")]
    short = {name: name.removeprefix(f"{part}/") for name in names}
    places = {short[name]: folder / name for name in names}
    return Files(places, {short[name]: manifest.files[name].digest for name in names}, "demo")
