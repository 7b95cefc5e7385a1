"""The artifact store: folders that appear whole, are checked when they are used, and are found by fingerprint.

``<root>/<kind>/<fingerprint>/`` holds a stage's files and ``artifact.json``, written last. Building: lock, look up
again, build in ``<kind>/.partial-<fingerprint>``, manifest, fsync, rename. No Prefect inside.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from megatron_ext.config import Section
from megatron_ext.errors import ConfigError, SourceError
from megatron_ext.folders import fsync_tree, full_disk_named
from tasks.digests import Checksum, checksum, same_content

ROOT = "MFLOW_ARTIFACTS"
MANIFEST = "artifact.json"
PARTIAL, LOCK, ASIDE, REMOVED = ".partial-", ".lock-", ".damaged-", ".removed"
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
PACKAGES = ("megatron-flows", "torch", "megatron-core", "transformers", "tokenizers", "lm-eval")


class Link(Section):
    """A file of the user's that an artifact refers to, as it was when it was pinned."""

    target: str
    size: int
    mtime_ns: int
    inode: int
    digest: str


class Manifest(Section):
    """``artifact.json``: what the folder is, from what and by which versions it was made, and how to check it."""

    stage: str
    version: int
    kind: str
    fingerprint: str
    identity: dict[str, Any]
    pointer: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, Any] = Field(default_factory=dict)
    runtime: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, Checksum]
    links: dict[str, Link] = Field(default_factory=dict)
    created: str
    seconds: float
    summary: dict[str, Any] = Field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the folder's own files; what it links to is not counted."""
        return sum(file.size for file in self.files.values())


class Store:
    """One root folder of artifacts."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @classmethod
    def current(cls) -> Store:
        """The store that ``MFLOW_ARTIFACTS`` names, else ``artifacts`` in the working folder."""
        return cls(Path(os.environ.get(ROOT) or "artifacts"))

    def folder(self, kind: str, fingerprint: str) -> Path:
        """Where the artifact lies or will lie."""
        return self.root / kind / fingerprint

    def partial(self, kind: str, fingerprint: str) -> Path:
        """Where it is built; what a killed attempt left is found there again."""
        return self.root / kind / f"{PARTIAL}{fingerprint}"

    def work(self, kind: str, fingerprint: str) -> Path:
        """Folder for the job file, the log and the events of the process that builds it."""
        return self.root / ".work" / f"{kind}-{fingerprint}"

    def manifest(self, kind: str, fingerprint: str) -> Manifest | None:
        """The artifact's manifest, unchecked; None when there is none or it cannot be read."""
        try:
            text = (self.folder(kind, fingerprint) / MANIFEST).read_text(encoding="utf-8")
            return Manifest.model_validate_json(text)
        except (OSError, ValidationError, ValueError):
            return None

    def look_up(self, kind: str, fingerprint: str) -> Manifest | None:
        """The manifest of an artifact that is there and undamaged, else None."""
        manifest = self.manifest(kind, fingerprint)
        return manifest if manifest and not self.faults(manifest) else None

    def link_faults(self, kind: str, fingerprint: str, part: str) -> list[str]:
        """One sentence for each of the user's files, linked below ``part``, that changed since it was pinned."""
        manifest = self.manifest(kind, fingerprint)
        links = manifest.links if manifest else {}
        folder = self.folder(kind, fingerprint)
        return [
            w for name, link in links.items() if name.startswith(f"{part}/") for w in _link_faults(folder / name, link)
        ]

    def faults(self, manifest: Manifest, *, full: bool = False) -> list[str]:
        """What is wrong with an artifact: one sentence for each missing or changed file.

        Files up to 64 MB are compared byte for byte through their digest, larger ones by size and sampled blocks;
        ``full`` reads everything.
        """
        folder, wrong = self.folder(manifest.kind, manifest.fingerprint), []
        for name, recorded in manifest.files.items():
            try:
                if not same_content(folder / name, recorded, full=full):
                    wrong.append(f"{folder / name} is not what was written")
            except OSError as error:
                wrong.append(f"{folder / name}: {error.strerror}")
        for name, link in manifest.links.items():
            wrong += _link_faults(folder / name, link)
        return wrong

    def with_origins(self, text: str) -> str:
        """``text`` with the user's own path in place of each path of a link in this store."""

        def origin(found: re.Match[str]) -> str:
            path = Path(found[0].rstrip(".,:;"))
            return found[0].replace(str(path), str(path.readlink())) if path.is_symlink() else found[0]

        return re.sub(re.escape(str(self.root)) + r"/[^\s'\"]+", origin, text)

    @contextmanager
    def locked(self, kind: str, fingerprint: str, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold the artifact's lock; yields its descriptor, which a subprocess that writes must inherit.

        The kernel frees the lock when the last process that holds the descriptor is gone. ``waiting`` is called
        while another holder works and may raise to give up.
        """
        path = self.root / kind / f"{LOCK}{fingerprint}"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    waiting()
                    time.sleep(0.2)
            yield descriptor
        finally:
            os.close(descriptor)

    def open_partial(self, kind: str, fingerprint: str) -> Path:
        """The folder to build in. Call with the lock held. A damaged artifact of this name is set aside."""
        self.set_aside(kind, fingerprint)
        partial = self.partial(kind, fingerprint)
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def set_aside(self, kind: str, fingerprint: str) -> None:
        """Rename an artifact's folder out of the way; nothing happens when there is none."""
        folder = self.folder(kind, fingerprint)
        if folder.exists():
            folder.rename(folder.parent / f"{ASIDE}{fingerprint}-{time.time_ns()}")

    def publish(self, partial: Path, links: dict[str, Link], **known: Any) -> Manifest:
        """Turn ``partial`` into the artifact: digests, manifest, fsync, rename. Call with the lock held.

        ``known`` are the manifest's fields that the stage knows.
        """
        (partial / MANIFEST).unlink(missing_ok=True)
        names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file() and not p.is_symlink())
        manifest = Manifest(
            files={name: checksum(partial / name) for name in names},
            links=links,
            versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **known,
        )
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        fsync_tree(partial)
        folder = self.folder(manifest.kind, manifest.fingerprint)
        partial.rename(folder)
        descriptor = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return manifest

    def artifacts(self) -> list[Manifest]:
        """Every artifact with a readable manifest, oldest first; not checked for damage."""
        found = (self.manifest(p.parent.parent.name, p.parent.name) for p in self.root.glob(f"[!.]*/[!.]*/{MANIFEST}"))
        return sorted((m for m in found if m), key=lambda m: (m.created, m.kind, m.fingerprint))

    def find(self, name: str) -> Manifest:
        """The artifact whose fingerprint, or ``kind/fingerprint``, begins with ``name``.

        Raises:
            SourceError: none or several begin so.
        """
        every = self.artifacts()
        hits = [m for m in every if m.fingerprint.startswith(name) or f"{m.kind}/{m.fingerprint}".startswith(name)]
        if len(hits) == 1:
            return hits[0]
        known = ", ".join(f"{m.kind}/{m.fingerprint[:12]}" for m in (hits or every)[-10:]) or "none"
        fault = "is not unique" if hits else "names no artifact"
        raise SourceError(f"{name!r} {fault} in {self.root}; there are: {known}")

    def leftovers(self) -> list[Path]:
        """Partials that nobody builds any more, damaged folders set aside, and work folders of jobs that ended."""
        paths = [*self.root.glob(f"*/{PARTIAL}*"), *self.root.glob(f"*/{ASIDE}*"), *self.root.glob(".work/*")]
        return sorted(path for path in paths if not self._in_use(path))

    def discard(self, leftover: Path) -> bool:
        """Delete one of ``leftovers``; False when somebody has begun to build there meanwhile."""

        class TakenUpError(Exception):
            pass

        def give_up() -> None:
            raise TakenUpError

        try:
            with self.locked(*_artifact_of(leftover), give_up):
                shutil.rmtree(leftover)
        except TakenUpError:
            return False
        return True

    def remove(self, manifest: Manifest) -> None:
        """Delete one artifact; a reader sees it whole or not at all.

        Raises:
            SourceError: a job that runs now reads it.
        """
        folder = self.folder(manifest.kind, manifest.fingerprint)
        for job in self.root.glob(".work/*/job.json"):
            if str(folder) in job.read_text(encoding="utf-8") and self._in_use(job.parent):
                raise SourceError(f"{folder} is in use by {job.parent.name}; remove it when that has ended")
        with self.locked(manifest.kind, manifest.fingerprint):
            doomed = self.partial(manifest.kind, f"{manifest.fingerprint}{REMOVED}")
            folder.rename(doomed)
            shutil.rmtree(doomed)

    def _in_use(self, path: Path) -> bool:
        kind, fingerprint = _artifact_of(path)
        try:
            descriptor = os.open(self.root / kind / f"{LOCK}{fingerprint}", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, a disk that is full or not ours to write on is the user's to mend.

        Raises:
            DiskSpaceError: no room is left.
            ConfigError: the store cannot be written.
        """
        try:
            with full_disk_named(self.root):
                yield
        except OSError as error:
            if error.errno in FORBIDDEN and self._concerns(error.filename):
                raise ConfigError(
                    f"cannot write to the artifact store: {error.filename}: {error.strerror}; name another folder "
                    f"with {ROOT}"
                ) from None
            raise

    def _concerns(self, name: str | None) -> bool:
        path = Path(name or self.root)
        return path == self.root or path in self.root.parents or self.root in path.parents


def _artifact_of(path: Path) -> tuple[str, str]:
    """Kind and fingerprint of the artifact to which a leftover belongs."""
    kind, name = path.parent.name, path.name
    if kind == ".work":
        kind, _, name = name.partition("-")
    if name.startswith(ASIDE):
        return kind, name.removeprefix(ASIDE).rpartition("-")[0]
    return kind, name.removeprefix(PARTIAL).removesuffix(REMOVED)


def _link_faults(path: Path, link: Link) -> list[str]:
    try:
        stat = path.stat()
    except OSError:
        return [f"{link.target} is gone"]
    if (stat.st_size, stat.st_mtime_ns, stat.st_ino) != (link.size, link.mtime_ns, link.inode):
        return [f"{link.target} has changed"]
    return []


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
