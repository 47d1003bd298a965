"""What a worker does with a chunk of raw records: decode, extract, clean, score. No state across chunks."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketphi.corpus import extraction, rules
from pocketphi.corpus.config import CorpusConfig, InputConfig
from pocketphi.corpus.decontamination import BenchmarkIndex
from pocketphi.corpus.document import Document, Raw, document_id
from pocketphi.corpus.extraction import TooManyNodes
from pocketphi.corpus.readers import format_of
from pocketphi.corpus.rules.batch import Batch, RuleContext
from pocketphi.corpus.rules.safety import replace_personal_data

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]|[\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\n{3,}")
_TRAILING = re.compile(r"[ \t\u00a0]+\n")
_MAX_REPLACED_SHARE = 0.05  # of characters that could not be decoded; more is not text


class Unusable(Exception):
    """A record that cannot become a document; its message goes to failures.jsonl."""


class TooSlow(Unusable):
    """A record that took longer than document_timeout_s."""


@dataclass
class Processed:
    """Documents with their scores (parallel lists), and the records that failed."""

    documents: list[Document] = field(default_factory=list)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    contamination_items: list[str] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)


class Processor:
    """Turns raw records of any source into scored documents. Built once per worker."""

    def __init__(self, config: CorpusConfig, index: BenchmarkIndex | None = None) -> None:
        from pocketphi.corpus.educational import load_scorer
        from pocketphi.corpus.rules.origin import load_url_lists

        self.config = config
        self.sources = config.sources()
        self.scorer = load_scorer(config.scorer)
        self.index = index
        self.context = RuleContext(
            languages=config.languages,
            license_deny=config.license_deny,
            respect_noai=config.respect_noai,
            url_deny=load_url_lists(config.url_deny),
        )

    def process(
        self,
        source: InputConfig,
        raws: Sequence[Raw],
        started: Callable[[int], None] = lambda index: None,
        skip: dict[int, str] | None = None,
    ) -> Processed:
        """Process one chunk. `started(i)` is called before record i, so that a watcher knows the culprit
        of a crash; `skip` maps records that killed a worker before to the reason of their failure."""
        done = Processed()
        places: list[str] = []
        for number, raw in enumerate(raws):
            started(number)
            try:
                if skip and number in skip:
                    raise Unusable(skip[number])
                if raw.error:
                    raise Unusable(raw.error)
                with time_limit(self.config.document_timeout_s):
                    document = self.document(source, raw)
            except (Unusable, TooManyNodes, MemoryError, RecursionError) as error:
                reason = str(error) or type(error).__name__
                done.failures.append({"source": source.name or "", "where": raw.where, "reason": reason})
                continue
            done.documents.append(document)
            places.append(raw.where)
        started(len(raws))
        self._score(source, done, places)
        return done

    def document(self, source: InputConfig, raw: Raw) -> Document:
        """Decode and extract one record; raises Unusable with the reason when there is no text."""
        raw = load(raw, source)
        meta: dict[str, Any] = {**raw.meta, "input": source.name, "where": raw.where}
        if source.quality != "web":
            meta["quality"] = source.quality
        url, licence = raw.url, raw.license
        if raw.html is not None:
            html = raw.html
            if isinstance(html, bytes):
                html, meta["charset"] = extraction.decode(html, raw.charset)
            page = extraction.extract(html, max_nodes=self.config.max_nodes)
            text, url, licence = page.text, url or page.url, licence or page.license
            if page.title:
                meta["title"] = page.title[:300]
            if page.noai:
                meta["noai"] = page.noai
        elif isinstance(raw.text, bytes):
            text, meta["charset"] = extraction.decode(raw.text, raw.charset)
        else:
            text = raw.text or ""
        noai = noai_header(raw.headers.get("x-robots-tag", ""))
        if raw.headers.get("tdm-reservation", "").strip() == "1":
            noai = "tdm-reservation"
        if noai:
            meta["noai"] = noai
        text = clean(text)
        if not text:
            raise Unusable("no text found in it")
        replaced = text.count("\ufffd")
        if replaced > _MAX_REPLACED_SHARE * len(text):
            raise Unusable(f"{replaced} of {len(text)} characters are not valid in its encoding")
        if replaced:
            meta["undecodable_characters"] = replaced
        document = Document(
            id="",
            text=text,
            url=url,
            source=raw.source or source.name or "",
            license=licence or source.license or "",
            fetched_at=raw.fetched_at,
            meta=meta,
        )
        if self.config.replace_pii:
            replace_personal_data(document)
        document.id = document_id(document.source, raw.key or raw.where, document.text)
        return document

    def _score(self, source: InputConfig, done: Processed, places: list[str]) -> None:
        """Fill in the scores of all documents; a document on which a rule hangs is cut off and named."""
        limit = max(30.0, self.config.document_timeout_s)
        try:
            with time_limit(limit):
                done.scores, done.contamination_items = self.score(done.documents)
        except TooSlow:
            usable: list[Document] = []
            for document, where in zip(done.documents, places):
                try:
                    with time_limit(self.config.document_timeout_s):
                        self.score([document])
                    usable.append(document)
                except TooSlow as error:
                    done.failures.append({"source": source.name or "", "where": where, "reason": str(error)})
            done.documents = usable
            done.scores, done.contamination_items = self.score(usable)

    def score(self, documents: Sequence[Document]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return `(scores by rule, the benchmark item found in each document or "")`."""
        batch = Batch(documents, self.context)
        found = rules.scores(batch)
        texts = batch.texts
        found["educational"] = np.asarray(self.scorer.score(texts), dtype=np.float32)
        items = [""] * len(documents)
        if self.index is not None:
            found["contamination"], items = self.index.search(texts)
        else:
            found["contamination"] = np.zeros(len(documents), dtype=np.float32)
        return found, items


def load(raw: Raw, source: InputConfig) -> Raw:
    """Bring the content of a record into memory: open its file or parse its JSON line."""
    if raw.path is not None:
        try:
            with open(raw.path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise Unusable(f"cannot be read: {error.strerror}") from None
        if raw.kind == "docstrings":
            from pocketphi.corpus.readers.python_docs import docstrings_of

            try:
                raw.text = docstrings_of(content, raw.where.removeprefix("stdlib:"))
            except (SyntaxError, ValueError) as error:
                raise Unusable(f"not valid Python: {error}") from None
            if not raw.text:
                raise Unusable("a module without docstrings")
        elif format_of(raw.path) == "page":
            raw.html = content
        else:
            raw.text = content
    elif raw.line is not None:
        try:
            row = json.loads(raw.line)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise Unusable(f"a JSON {type(row).__name__}, not an object")
        value = row.get(source.text_field)
        if isinstance(value, str):
            raw.text = value
        elif isinstance(row.get(source.html_field), str):
            raw.html = row[source.html_field]
        else:
            raise Unusable(f"no field '{source.text_field}' or '{source.html_field}' with text")
        raw.url = _string(row.get("url")) or raw.url
        raw.source = _string(row.get("source")) or raw.source
        raw.license = _string(row.get("license")) or raw.license
        raw.fetched_at = (
            _string(row.get("fetched_at") or row.get("date") or row.get("added")) or raw.fetched_at
        )
        original = _string(row.get("id"))
        if original:
            raw.key = raw.meta["original_id"] = original
        raw.line = None
    return raw


def _string(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def clean(text: str) -> str:
    """Normalise line ends and white space, drop control characters and broken surrogates."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text)
    text = _TRAILING.sub("\n", text)
    return _BLANK_LINES.sub("\n\n", text).strip()


def noai_header(value: str) -> str:
    """Return the directive of an X-Robots-Tag header or robots meta tag that forbids learning from the page."""
    for directive in re.split(r"[,\s]+", value.lower()):
        if directive in ("noai", "noml", "noimageai"):
            return directive
    return ""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow inside the block after `seconds` of this process's CPU time; no limit outside the main thread.

    CPU time, so that a busy machine drops no document. A call into C that does not return is not
    interrupted; the pool kills its process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TooSlow(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
