"""Artifacts: the folders that stages hand to one another.

An artifact is a folder with `manifest.json` beside its files: kind, schema version, configuration,
seed, code version, a sha256 per file, parents, counts in and out, timings. It is written under
`<folder>.partial`, synced to disk and renamed, so a folder with a manifest is always whole.

    if done := artifact.reuse(out, kind="corpus", config=config, parents=parents):
        return done
    with artifact.create(out, kind="corpus", config=config, parents=parents) as draft:
        (draft.path / "documents.parquet").write_bytes(...)
        draft.counts["documents_in"] = n
    return draft.artifact

The *fingerprint* says what was asked for (kind, schema, configuration, parents' checksums, source
files); the *checksum* says what came out (the files' hashes, no times and no paths). A stage whose
fingerprint is already published is skipped; one that was killed finds its partial folder again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketphi import __version__
from pocketphi.core import progress
from pocketphi.core.config import to_tree
from pocketphi.core.errors import DataError, UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_DRAFT = ".draft.json"


@dataclass(frozen=True)
class Artifact:
    """A published, verified folder. `manifest` is the parsed manifest.json."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def fingerprint(self) -> str:
        """What was asked for."""
        return self.manifest["fingerprint"]

    @property
    def checksum(self) -> str:
        """What came out: a hash over the files' hashes, equal for equal content."""
        return self.manifest["checksum"]

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest["config"]

    @property
    def counts(self) -> dict[str, Any]:
        return self.manifest["counts"]

    @property
    def parents(self) -> list[dict[str, str]]:
        """`[{"kind", "path", "checksum"}]`, paths relative to this folder."""
        return self.manifest["parents"]

    def file(self, name: str) -> Path:
        """Return the path of a file of this artifact; raises DataError if it holds none such."""
        if name not in self.manifest["files"]:
            raise DataError(f"{self.path}: the {self.kind} artifact holds no file '{name}'")
        return self.path / name


@dataclass
class Draft:
    """An artifact being written. Put files under `path`, numbers into `counts` and `timings`.

    Files named in `volatile` may hold times or speeds; they are kept and verified like the others but
    do not count for the artifact's checksum, which is equal for equal work.
    """

    path: Path
    resumed: bool
    counts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    volatile: set[str] = field(default_factory=set)
    _published: Artifact | None = None

    @property
    def artifact(self) -> Artifact:
        """The published artifact, once the `create` block has ended without an error."""
        if self._published is None:
            raise RuntimeError("the artifact is not published before its block ends")
        return self._published


def fingerprint(
    kind: str,
    config: Any,
    parents: Iterable[Artifact] = (),
    sources: Iterable[Path | str] = (),
    schema: int = SCHEMA_VERSION,
) -> str:
    """Hash what is asked for. `sources` are files outside any artifact (size and time count)."""
    tree = {
        "kind": kind,
        "schema": schema,
        "config": to_tree(config),
        "parents": [p.checksum for p in parents],
        "sources": [_source_identity(Path(s)) for s in sources],
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def default_path(
    kind: str, config: Any, parents: Iterable[Artifact] = (), sources: Iterable[Path | str] = ()
) -> Path:
    """Where a stage writes when its caller names no folder: `runs/<kind>-<fingerprint>`."""
    return Path("runs") / f"{kind}-{fingerprint(kind, config, parents, sources)[:12]}"


def load(path: Artifact | Path | str, *, kind: str | None = None, verify: bool = True) -> Artifact:
    """Open a published artifact and check it against its manifest.

    `verify=False` checks presence and sizes only. Raises DataError that names the file when
    anything is missing, changed, of another kind, or written by a newer schema.
    """
    if isinstance(path, Artifact):
        found = path
        if kind is not None and found.kind != kind:
            raise DataError(f"{found.path}: expected a {kind} artifact, found {found.kind}")
        return found
    path = Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        hint = f"'{path}.partial' is an unfinished one: run its stage again to finish it"
        raise DataError(
            f"{path}: no artifact here ({MANIFEST} is missing)",
            hint=hint if path.with_name(path.name + ".partial").exists() else None,
        )
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = manifest["files"]
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest_path}: not a readable manifest: {error}") from None
    if schema > SCHEMA_VERSION:
        raise DataError(
            f"{manifest_path}: schema {schema} is newer than this version reads ({SCHEMA_VERSION})",
            hint="upgrade pocketphi",
        )
    found = Artifact(path, manifest)
    if kind is not None and found.kind != kind:
        raise DataError(f"{path}: expected a {kind} artifact, found {found.kind}")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise DataError(f"{file}: missing", hint=f"delete {path} and run its stage again")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise DataError(
                f"{file}: {size} bytes, the manifest says {entry['bytes']}",
                hint=f"the file is damaged: delete {path} and run its stage again",
            )
        if verify and file_sha256(file) != entry["sha256"]:
            raise DataError(
                f"{file}: checksum differs from the manifest",
                hint=f"the file is damaged: delete {path} and run its stage again",
            )
    return found


def reuse(
    out: Path | str,
    *,
    kind: str,
    config: Any,
    parents: Iterable[Artifact] = (),
    sources: Iterable[Path | str] = (),
) -> Artifact | None:
    """Return the artifact at `out` if it answers exactly this question, else None.

    A damaged artifact is reported and made again.
    """
    out = Path(out)
    if not (out / MANIFEST).exists():
        return None
    try:
        found = load(out, kind=kind)
    except DataError as error:
        progress.say(f"{error.message}; making it again")
        return None
    if found.fingerprint != fingerprint(kind, config, parents, sources):
        return None
    progress.event("reused", kind=kind, path=str(out))
    return found


@contextlib.contextmanager
def create(
    out: Path | str,
    *,
    kind: str,
    config: Any,
    parents: Iterable[Artifact] = (),
    sources: Iterable[Path | str] = (),
    seed: int | None = None,
    resumable: bool = False,
) -> Iterator[Draft]:
    """Write an artifact: yields a Draft, publishes it when the block ends without an error.

    With `resumable`, a partial folder of the same fingerprint is kept (`draft.resumed` is true and
    the stage continues from what it finds); otherwise it is emptied first. Raises UserError when
    `out` holds something that is not an artifact, when another process writes it, or when the disk
    is full (what was written stays, and the next run continues).
    """
    out = Path(out)
    parents, sources = list(parents), list(sources)
    wanted = fingerprint(kind, config, parents, sources)
    if out.exists() and not (out / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: exists and is not an artifact; nothing was written", hint="name another --out"
        )
    work = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with _lock(out), _explain_full_disk(work):
        resumed = _prepare(work, wanted, resumable)
        draft = Draft(work, resumed)
        if resumed:
            progress.say(f"continuing {work}")
        progress.event("stage_start", kind=kind, path=str(out), resumed=resumed)
        yield draft
        draft.timings.setdefault("wall_s", round(time.time() - started, 3))
        manifest = {
            "kind": kind,
            "schema": SCHEMA_VERSION,
            "fingerprint": wanted,
            "config": to_tree(config),
            "seed": seed,
            "code_version": __version__,
            "parents": [
                {"kind": p.kind, "path": os.path.relpath(p.path, out), "checksum": p.checksum}
                for p in parents
            ],
            "sources": [_source_identity(Path(s)) for s in sources],
            "volatile": sorted(draft.volatile),
            "counts": to_tree(draft.counts),
            "timings": to_tree(draft.timings),
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        draft._published = _publish(work, out, manifest)
        progress.event("stage_end", kind=kind, path=str(out), counts=draft.counts, timings=draft.timings)


def sources_unchanged(found: Artifact) -> bool:
    """Whether the files outside any artifact that `found` was made from are as they were."""
    return all(_source_identity(Path(s["path"])) == s for s in found.manifest["sources"])


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha(file)
        )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file whole: to a temporary name, synced, then renamed over `path`."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def lineage(found: Artifact) -> list[Artifact]:
    """Return `found` and all its ancestors that are still on disk, nearest first."""
    seen: dict[str, Artifact] = {}
    queue = [found]
    while queue:
        node = queue.pop(0)
        if node.checksum in seen:
            continue
        seen[node.checksum] = node
        for parent in node.parents:
            folder = Path(os.path.normpath(node.path / parent["path"]))
            if (folder / MANIFEST).is_file():
                queue.append(load(folder, verify=False))
    return list(seen.values())


def _sha(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _source_identity(path: Path) -> dict[str, Any]:
    try:
        stat = path.stat()
    except OSError:
        return {"path": str(path)}
    return {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _prepare(work: Path, wanted: str, resumable: bool) -> bool:
    note = work / _DRAFT
    if resumable and note.is_file():
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_text())["fingerprint"] == wanted:
                return True
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    write_atomic(note, json.dumps({"fingerprint": wanted}))
    return False


def _publish(work: Path, out: Path, manifest: Mapping[str, Any]) -> Artifact:
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in work.rglob("*") if p.is_file() and p.name not in (MANIFEST, _DRAFT)):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(work).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    if not files:
        raise DataError(f"{out}: the {manifest['kind']} stage wrote no file; an empty result is an error")
    digest = hashlib.sha256()
    for name, entry in files.items():
        if name in manifest["volatile"]:
            continue
        digest.update(f"{name}\0{entry['sha256']}\n".encode())
    whole = {**manifest, "checksum": digest.hexdigest(), "files": files}
    write_atomic(work / MANIFEST, json.dumps(whole, indent=1) + "\n")
    _sync_folder(work)
    old = out.with_name(out.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        os.replace(out, old)
    os.replace(work, out)
    # Last, so that a kill at any point before finds a partial folder that knows its fingerprint.
    (out / _DRAFT).unlink()
    _sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)
    return Artifact(out, whole)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold `<out>.lock`; the kernel releases it when the process dies, however it dies."""
    path = out.with_name(f".{out.name}.lock")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another process is writing it", hint="wait for it, or stop it") from None
        yield


@contextlib.contextmanager
def _explain_full_disk(work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{error.filename or work}: the disk is full; nothing unfinished was published",
            hint="free some space and run the same command again: it continues",
        ) from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
