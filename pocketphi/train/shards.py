"""Token shards: the corpus as token ids on disk, one file a split, checked on every opening.

`<split>.bin`   the ids of all documents, end to end, each closed by `<|endoftext|>`; little-endian
                uint16, or uint32 when the vocabulary has more than 65536 entries
`<split>.idx`   uint64, num_documents + 1 numbers: where each document starts, then num_tokens
`<split>.nbytes` uint32, the UTF-8 bytes of each document's text (for bits per byte)
`<split>.ids`   the documents' ids, one a line, so that a token leads back to its document
`<split>.json`  counts, sources, the tokenizer's hash and the sha256 of the files above

Splits: `phase1`, `phase2` and `heldout-<source>`. Within a split documents stand source by source
(so that a source is one range of tokens) and inside a source in the order of a hash of seed and id
(so that neighbours are unrelated, whatever order the corpus was read in).
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError, did_you_mean

FORMAT = 1
_OTHER = "other"
_BATCH = 256  # documents tokenized at once
_SIDE_FILES = ("idx", "nbytes", "ids")


@dataclass
class ShardsConfig:
    """How documents become shards.

    `group_by` names what counts as one source for the mixture and for held-out figures: the
    collection (input file) a document came from, or the document's own `source` without version.
    Sources with fewer than `min_heldout_documents` held-out documents share `heldout-other`.
    `groups` renames sources: pattern -> name, first match wins.
    """

    seed: int = 0
    group_by: Literal["collection", "source"] = "collection"
    groups: dict[str, str] = field(default_factory=dict)
    min_heldout_documents: int = 2
    max_sources: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.max_sources <= 4096:
            raise ConfigError(f"max_sources must lie in 1..4096, found {self.max_sources}")


@dataclass(frozen=True)
class Source:
    """One range of a split: `num_tokens` ids from token `first_token` on."""

    name: str
    first_document: int
    num_documents: int
    first_token: int
    num_tokens: int
    num_bytes_text: int


@dataclass(frozen=True)
class Split:
    """An opened split. `tokens` and `starts` are read-only memory maps (nothing is loaded)."""

    name: str
    path: Path
    tokens: np.ndarray
    starts: np.ndarray
    nbytes: np.ndarray
    sources: tuple[Source, ...]
    eos_id: int
    vocab_size: int
    tokenizer_sha256: str

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_bytes_text(self) -> int:
        return int(self.nbytes.sum(dtype=np.int64))

    def first_documents(self, count: int) -> Split:
        """A view of the first `count` documents, as one source."""
        count = min(count, self.num_documents)
        size, text = int(self.starts[count]), int(self.nbytes[:count].sum(dtype=np.int64))
        source = Source(self.name, 0, count, 0, size, text)
        return replace(
            self,
            tokens=self.tokens[:size],
            starts=self.starts[: count + 1],
            nbytes=self.nbytes[:count],
            sources=(source,),
        )


def run(
    config: ShardsConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Tokenize the kept documents of a corpus into shards.

    `inputs`: `corpus` (artifact), `tokenizer` (artifact or folder). Returns the `shards` artifact.
    Raises DataError when a phase would be empty or a part of the corpus is damaged.
    """
    from pocketphi import tokenizer as tokenizers

    corpus = artifact.load(inputs["corpus"], kind="corpus")
    parents, sources = [corpus], []
    given = inputs["tokenizer"]
    if isinstance(given, Artifact) or (Path(given) / artifact.MANIFEST).is_file():
        tokenizer_artifact = artifact.load(given, kind="tokenizer")
        parents.append(tokenizer_artifact)
        folder = tokenizer_artifact.path
    else:
        folder = Path(given)
        sources = sorted(p for p in folder.glob("tokenizer*.json")) if folder.is_dir() else [folder]
    out = out or artifact.default_path("shards", config, parents, sources)
    asked: dict[str, Any] = {"kind": "shards", "config": config, "parents": parents, "sources": sources}
    if done := artifact.reuse(out, **asked):
        return done
    tokenizer = tokenizers.load(folder)
    with artifact.create(out, **asked, seed=config.seed) as draft:
        writer = _Writer(draft.path, config, tokenizer)
        total = corpus.counts.get("documents_in")
        with progress.bar("shards", total, unit="documents") as bar:
            for documents in _batches(read_documents(corpus), _BATCH):
                writer.add(documents)
                bar.advance(len(documents), tokens=progress.quantity(writer.num_tokens))
        draft.counts.update(writer.close())
    return draft.artifact


def plan(config: ShardsConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Forecast: `tokens`, `wall_s`, `peak_memory_bytes`, `disk_bytes` from the corpus' forecast."""
    corpus = inputs_plan.get("corpus", {})
    vocab_size = int(inputs_plan.get("tokenizer", {}).get("vocab_size", 8192))
    text_bytes = 4.0 * float(corpus.get("tokens", 5e6))  # the corpus counts four bytes a token
    # English text: about 3.6 bytes a token with 8k entries, a third of a byte more for each doubling.
    tokens = int(text_bytes / (3.6 + 0.3 * np.log2(max(vocab_size, 512) / 8192)))
    itemsize = 2 if vocab_size <= 65536 else 4
    # The second phase repeats part of the first; both pass through one spool file.
    return {
        "tokens": tokens,
        "wall_s": round(3 + text_bytes / 1.2e6, 1),
        "peak_memory_bytes": int(4e8 + 0.02 * text_bytes),
        "disk_bytes": int(3 * tokens * itemsize),
    }


def open_split(
    folder: Artifact | Path | str, name: str, *, tokenizer_sha256: str | None = None, verify: bool = True
) -> Split:
    """Open `<folder>/<name>.bin` and check it.

    `verify=False` skips the sha256 (sizes and index are always checked). Raises DataError, naming
    the file and the way out, when the shard is missing, truncated, changed, empty, or was written
    with another tokenizer.
    """
    folder = folder.path if isinstance(folder, Artifact) else Path(folder)
    again = f"run `phi tokenizer shard` again (delete {folder} first)"
    note = folder / f"{name}.json"
    if not note.is_file():
        known = split_names(folder)
        raise DataError(
            f"{note}: no such split{did_you_mean(name, known)}", hint=again if not known else None
        )
    try:
        meta = json.loads(note.read_text(encoding="utf-8"))
        dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
        num_tokens, num_documents = int(meta["num_tokens"]), int(meta["num_documents"])
        sources = tuple(Source(**s) for s in meta["sources"])
        eos_id, vocab_size = int(meta["eos_id"]), int(meta["vocab_size"])
        written_with, checksums = str(meta["tokenizer_sha256"]), dict(meta["files"])
        checksums["bin"] = str(meta["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{note}: not a readable shard description: {error!r}", hint=again) from None
    if num_tokens == 0 or num_documents == 0:
        raise DataError(
            f"{folder / name}.bin: the split is empty",
            hint="no document of the corpus was assigned to it: lower the corpus' thresholds or add inputs",
        )
    if tokenizer_sha256 is not None and tokenizer_sha256 != written_with:
        raise DataError(
            f"{folder / name}.bin: written with another tokenizer "
            f"({written_with[:12]}, this one is {tokenizer_sha256[:12]})",
            hint=f"use the tokenizer the shards were made with, or {again}",
        )
    sizes = {
        "bin": num_tokens * np.dtype(dtype).itemsize,
        "idx": (num_documents + 1) * 8,
        "nbytes": num_documents * 4,
    }
    for suffix in ("bin", *_SIDE_FILES):
        path = folder / f"{name}.{suffix}"
        if not path.is_file():
            raise DataError(f"{path}: missing", hint=again)
        size = path.stat().st_size
        if suffix in sizes and size != sizes[suffix]:
            raise DataError(f"{path}: {size} bytes, {note.name} says {sizes[suffix]}", hint=again)
        if verify and artifact.file_sha256(path) != checksums.get(suffix):
            raise DataError(f"{path}: checksum differs from {note.name}; the shard is damaged", hint=again)
    starts = np.memmap(folder / f"{name}.idx", dtype="<u8", mode="r")
    if starts[0] != 0 or starts[-1] != num_tokens or np.any(np.diff(starts.astype(np.int64)) <= 0):
        raise DataError(
            f"{folder / name}.idx: document starts are not increasing to {num_tokens}", hint=again
        )
    if sum(s.num_tokens for s in sources) != num_tokens:
        raise DataError(f"{note}: the sources' tokens do not add up to {num_tokens}", hint=again)
    return Split(
        name=name,
        path=folder / f"{name}.bin",
        tokens=np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r"),
        starts=starts,
        nbytes=np.memmap(folder / f"{name}.nbytes", dtype="<u4", mode="r"),
        sources=sources,
        eos_id=eos_id,
        vocab_size=vocab_size,
        tokenizer_sha256=written_with,
    )


def split_names(folder: Artifact | Path | str) -> list[str]:
    """Names of the splits in a folder, sorted."""
    folder = folder.path if isinstance(folder, Artifact) else Path(folder)
    return sorted(p.stem for p in folder.glob("*.json") if p.with_suffix(".bin").exists())


def read_documents(corpus: Artifact) -> Iterator[dict[str, Any]]:
    """Yield every document of a corpus artifact with its verdict: id, text, source, collection,
    license, keep, phase1, phase2, heldout. In the order of the parts."""
    import pyarrow.parquet as parquet

    parts = sorted((corpus.path / "documents").glob("part-*.parquet"))
    if not parts:
        raise DataError(f"{corpus.path}: the corpus holds no documents/part-*.parquet")
    columns = ["id", "text", "source", "license", "meta"]
    marks = ["id", "keep", "phase1", "phase2", "heldout"]
    for part in parts:
        beside = corpus.path / "verdicts" / part.name
        if not beside.is_file():
            raise DataError(f"{beside}: missing beside {part}", hint="build the corpus again")
        documents, verdicts = parquet.ParquetFile(part), parquet.ParquetFile(beside)
        if missing := set(marks) - set(verdicts.schema_arrow.names):
            raise DataError(f"{beside}: no column '{sorted(missing)[0]}'", hint="build the corpus again")
        if documents.metadata.num_rows != verdicts.metadata.num_rows:
            raise DataError(f"{beside}: {verdicts.metadata.num_rows} rows, {part} has another number")
        verdict_rows = (
            row for batch in verdicts.iter_batches(1024, columns=marks) for row in batch.to_pylist()
        )
        for batch in documents.iter_batches(1024, columns=columns):
            for document in batch.to_pylist():
                verdict = next(verdict_rows)
                if verdict["id"] != document["id"]:
                    raise DataError(f"{beside}: rows are not aligned with {part} at id {document['id']}")
                document["collection"] = _collection(document)
                yield {**document, **verdict}


def _batches(documents: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(documents, size)):
        yield batch


def _collection(document: Mapping[str, Any]) -> str:
    """The input a document came from; the corpus stage notes it in `meta`."""
    meta = document.get("meta")
    if isinstance(meta, str) and meta:
        try:
            noted = json.loads(meta)
        except ValueError:
            noted = {}
        for key in ("input", "collection"):
            if isinstance(noted, dict) and noted.get(key):
                return Path(str(noted[key])).name.split(".")[0]
    return _bare_source(str(document.get("source") or ""))


def _bare_source(source: str) -> str:
    """`owner/repo@commit` -> `repo`, `pypi:package==1.0` -> `package`."""
    bare = re.split(r"@|==", source)[0].split(":")[-1].rstrip("/")
    return bare.rsplit("/", 1)[-1] or "unknown"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48] or "unknown"


@dataclass
class _Noted:
    """What the spool pass remembers of one document."""

    source: str
    key: bytes
    id: str
    start: int
    num_tokens: int
    num_bytes: int
    splits: tuple[str, ...]


class _Writer:
    """Spools documents in reading order, then writes each split in its final order."""

    def __init__(self, folder: Path, config: ShardsConfig, tokenizer: Any) -> None:
        self.folder, self.config, self.tokenizer = folder, config, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
        self.num_tokens = 0
        self.noted: list[_Noted] = []
        self.counts: dict[str, int] = {"documents_in": 0, "documents_rejected": 0, "documents_unassigned": 0}
        self._spool_path = folder / "spool.tmp"
        self._spool: IO[bytes] = open(self._spool_path, "wb")  # noqa: SIM115 - closed in close()

    def add(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Tokenize documents, all at once (on all cores), and spool those that belong to a split."""
        self.counts["documents_in"] += len(documents)
        chosen: list[tuple[Mapping[str, Any], tuple[str, ...]]] = []
        for document in documents:
            splits = tuple(name for name in ("phase1", "phase2") if document[name])
            if not document["keep"]:
                self.counts["documents_rejected"] += 1
            elif document["heldout"]:
                chosen.append((document, ("heldout",)))
            elif splits:
                chosen.append((document, splits))
            else:
                self.counts["documents_unassigned"] += 1
        encoded = self.tokenizer.encode_batch([document["text"] for document, _ in chosen])
        for (document, splits), ids in zip(chosen, encoded):
            self._spool_one(document, splits, [*ids, self.tokenizer.eos_id])

    def _spool_one(self, document: Mapping[str, Any], splits: tuple[str, ...], ids: list[int]) -> None:
        self._spool.write(np.asarray(ids, dtype=self.dtype).tobytes())
        key = hashlib.sha256(f"{self.config.seed}:{document['id']}".encode()).digest()[:8]
        size = len(document["text"].encode())
        source = self._source(document)
        self.noted.append(_Noted(source, key, document["id"], self.num_tokens, len(ids), size, splits))
        self.num_tokens += len(ids)

    def _source(self, document: Mapping[str, Any]) -> str:
        by_source = self.config.group_by == "source"
        name = _slug(_bare_source(str(document.get("source") or "")) if by_source else document["collection"])
        for pattern, renamed in self.config.groups.items():
            if fnmatch.fnmatch(name, pattern):
                return _slug(renamed)
        return name

    def close(self) -> dict[str, Any]:
        """Write every split; return flat counts."""
        self._spool.close()
        if not self.noted:
            raise DataError(
                "no document of the corpus is kept and assigned to a phase; there is nothing to train on",
                hint="lower the corpus' thresholds or give it more inputs",
            )
        self._merge_small_sources()
        spool = np.memmap(self._spool_path, dtype=self.dtype, mode="r")
        names = {"phase1", "phase2"}
        for noted in self.noted:
            if noted.splits == ("heldout",):
                noted.splits = (f"heldout-{noted.source}",)
                names.add(noted.splits[0])
        self._merge_small_heldout(names)
        for name in sorted(names):
            chosen = [n for n in self.noted if name in n.splits]
            if not chosen:
                raise DataError(
                    f"split '{name}' would be empty: no kept document of the corpus is marked {name}",
                    hint="lower the corpus' thresholds or give it more inputs",
                )
            self._write_split(name, chosen, spool)
            label = name.replace("-", "_")
            self.counts[f"documents_{label}"] = len(chosen)
            self.counts[f"tokens_{label}"] = sum(n.num_tokens for n in chosen)
            self.counts[f"bytes_{label}"] = sum(n.num_bytes for n in chosen)
        del spool
        self._spool_path.unlink()
        self.counts["tokens"] = self.num_tokens
        self.counts["vocab_size"] = self.tokenizer.vocab_size
        if not any(name.startswith("heldout") for name in names):
            progress.say("shards: no document is held out; training will report no held-out bits per byte")
        return self.counts

    def _merge_small_sources(self) -> None:
        """Keep the largest sources; the rest become `other` (said, never dropped)."""
        tokens: dict[str, int] = {}
        for noted in self.noted:
            tokens[noted.source] = tokens.get(noted.source, 0) + noted.num_tokens
        if len(tokens) <= self.config.max_sources:
            return
        largest = sorted(tokens, key=lambda s: (-tokens[s], s))[: self.config.max_sources - 1]
        kept = set(largest)
        progress.say(f"shards: {len(tokens) - len(kept)} small sources are counted together as '{_OTHER}'")
        for noted in self.noted:
            if noted.source not in kept:
                noted.source = _OTHER

    def _merge_small_heldout(self, names: set[str]) -> None:
        count: dict[str, int] = {}
        for noted in self.noted:
            for name in noted.splits:
                count[name] = count.get(name, 0) + 1
        small = {n for n in names if n.startswith("heldout") and count[n] < self.config.min_heldout_documents}
        if len(small) < 2 and f"heldout-{_OTHER}" not in names - small:
            return
        for noted in self.noted:
            if noted.splits[0] in small:
                noted.splits = (f"heldout-{_OTHER}",)
        names -= small
        names.add(f"heldout-{_OTHER}")

    def _write_split(self, name: str, chosen: list[_Noted], spool: np.ndarray) -> None:
        chosen.sort(key=lambda n: (n.source, n.key, n.id))
        starts = np.zeros(len(chosen) + 1, dtype="<u8")
        np.cumsum([n.num_tokens for n in chosen], out=starts[1:])
        sources: list[dict[str, Any]] = []
        with open(self.folder / f"{name}.bin", "wb") as file:
            for index, noted in enumerate(chosen):
                file.write(spool[noted.start : noted.start + noted.num_tokens].tobytes())
                if not sources or sources[-1]["name"] != noted.source:
                    sources.append(
                        {
                            "name": noted.source,
                            "first_document": index,
                            "num_documents": 0,
                            "first_token": int(starts[index]),
                            "num_tokens": 0,
                            "num_bytes_text": 0,
                        }
                    )
                sources[-1]["num_documents"] += 1
                sources[-1]["num_tokens"] += noted.num_tokens
                sources[-1]["num_bytes_text"] += noted.num_bytes
        (self.folder / f"{name}.idx").write_bytes(starts.tobytes())
        (self.folder / f"{name}.nbytes").write_bytes(np.array([n.num_bytes for n in chosen], "<u4").tobytes())
        (self.folder / f"{name}.ids").write_text("".join(f"{n.id}\n" for n in chosen), encoding="utf-8")
        describe_split(self.folder, name, self.dtype, sources, self.tokenizer)


def describe_split(
    folder: Path, name: str, dtype: np.dtype, sources: list[dict[str, Any]], tokenizer: Any
) -> None:
    """Write `<name>.json` for the files already in `folder` (see the head of this module)."""
    sha: Callable[[str], str] = lambda suffix: artifact.file_sha256(folder / f"{name}.{suffix}")  # noqa: E731
    meta = {
        "format": FORMAT,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "num_tokens": sum(s["num_tokens"] for s in sources),
        "num_documents": sum(s["num_documents"] for s in sources),
        "num_bytes_text": sum(s["num_bytes_text"] for s in sources),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "sources": sources,
        "sha256": sha("bin"),
        "files": {suffix: sha(suffix) for suffix in _SIDE_FILES},
    }
    artifact.write_atomic(folder / f"{name}.json", json.dumps(meta, indent=1) + "\n")
