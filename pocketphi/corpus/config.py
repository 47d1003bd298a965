"""Configuration of the corpus stage: what is read, which thresholds hold, what enters which phase."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from pocketphi.core.errors import ConfigError

Engine = Literal["local", "ray"]
Quality = Literal["web", "textbook", "encyclopedia", "docs", "book", "news", "story", "howto"]

PYTHON_DOCS = "python-docs"
MAX_EPOCHS = 4.0  # past about four repetitions more epochs of the same text add little (Muennighoff 2023)


@dataclass(frozen=True)
class RuleConfig:
    """The thresholds of one rule: a document is kept when min <= score <= max.

    An absent bound keeps the rule's own default; `.inf` and `-.inf` lift it. A disabled rule still
    stores its score, so that a threshold can be set later without reading the documents again.
    """

    min: float | None = None
    max: float | None = None
    enabled: bool = True


@dataclass(frozen=True)
class InputConfig:
    """One source: a file, a folder, `hf:NAME`, or `python-docs`.

    `quality` says what kind of text it is: "web" meets every rule, the others are curated and meet
    only the rules that hold for any text. `max_documents` takes that many, spread evenly over the
    source. `phases` are the training phases that its documents may enter. `epochs` says how often
    a phase is to read it: `phi corpus plan` turns that into weights of the trainer's mixture.
    """

    path: str
    name: str | None = None
    quality: Quality = "web"
    max_documents: int | None = None
    phases: tuple[int, ...] = (1, 2)
    epochs: dict[str, float] = field(default_factory=dict)  # {"1": 1.0, "2": 2.0}
    license: str | None = None  # of documents that name none themselves
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    text_field: str = "text"
    html_field: str = "html"

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 1:
            raise ConfigError(f"{self.path}: max_documents must be at least 1, found {self.max_documents}")
        for phase in self.phases:
            if phase not in (1, 2):
                raise ConfigError(f"{self.path}: phases are 1 and 2, found {phase}")
        for name, epochs in self.epochs.items():
            if name not in ("1", "2") or epochs <= 0:
                raise ConfigError(
                    f"{self.path}: epochs maps a phase (1 or 2) to a positive number, found {name}: {epochs}"
                )


@dataclass(frozen=True)
class PhaseConfig:
    """What enters a training phase, beyond being kept.

    `min_educational` is on the 0 to 5 scale. Sources whose quality is in `always` enter whatever
    their score: the scorer was trained on their like.
    """

    min_educational: float = 0.0
    always: tuple[str, ...] = ("textbook",)


@dataclass(frozen=True)
class CorpusConfig:
    """Settings of `pocketphi.corpus.run`. An entry of `inputs` is a path or an InputConfig."""

    inputs: tuple[InputConfig | str, ...] = (PYTHON_DOCS,)
    seed: int = 0
    languages: tuple[str, ...] = ("en",)  # empty: every language
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    phase1: PhaseConfig = field(default_factory=PhaseConfig)
    phase2: PhaseConfig = field(default_factory=lambda: PhaseConfig(min_educational=2.5))
    heldout_fraction: float = 0.01  # of the kept documents, by hash of id, for bits per byte
    scorer: str | None = None  # a trained educational scorer; default: the one in the package
    benchmarks: tuple[str, ...] = ()  # files or folders whose items must not be trained on
    contamination_chars: int = 32  # letters and digits of a piece that counts as an overlap
    license_deny: tuple[str, ...] = ()  # lower-case substrings; "" denies documents without a licence
    respect_noai: bool = True  # robots meta tags noai, noimageai, tdm-reservation, X-Robots-Tag
    url_deny: tuple[str, ...] = ()  # files of domains or URL prefixes, one per line
    replace_pii: bool = True
    near_duplicates: bool = True
    near_duplicate_jaccard: float = 0.8
    repeated_lines: bool = True  # across the documents of one web site
    engine: Engine = "local"  # "ray": on a Ray cluster, or Ray on this machine
    ray_address: str | None = None  # of a running cluster
    workers: int = 0  # 0: one per core
    chunk_documents: int = 512  # documents per part, the unit of work, of resumption and of files
    chunk_bytes: int = 32 << 20
    max_document_bytes: int = 16 << 20  # raw bytes of one document
    max_nodes: int = 500_000  # elements of one page
    document_timeout_s: float = 10.0
    worker_memory_bytes: int = 4 << 30
    dedup_memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("inputs is empty", hint=f"name files or folders, or use [{PYTHON_DOCS}]")
        if not 0 <= self.heldout_fraction < 0.5:
            raise ConfigError(f"heldout_fraction must be in [0, 0.5), found {self.heldout_fraction}")
        for name in ("chunk_documents", "chunk_bytes", "max_document_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 16 <= self.contamination_chars <= 64:
            raise ConfigError(
                f"contamination_chars must be between 16 and 64, found {self.contamination_chars}"
            )
        if self.document_timeout_s <= 0:
            raise ConfigError(f"document_timeout_s must be positive, found {self.document_timeout_s}")
        if self.ray_address and self.engine != "ray":
            raise ConfigError("ray_address is set, but engine is local", hint="set engine to ray")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, found {self.workers}")

    def identity(self) -> CorpusConfig:
        """Return the part of the configuration that decides the output: not who computes it."""
        return dataclasses.replace(self, workers=0, engine="local", ray_address=None)

    def sources(self) -> list[InputConfig]:
        """Return the inputs with bare paths filled in and unique names."""
        filled: list[InputConfig] = []
        used: set[str] = set()
        for entry in self.inputs:
            source = _bare(entry) if isinstance(entry, str) else entry
            base = name = source.name or default_name(source.path)
            number = 2
            while name in used:
                name, number = f"{base}-{number}", number + 1
            used.add(name)
            filled.append(dataclasses.replace(source, name=name))
        return filled


def _bare(path: str) -> InputConfig:
    return InputConfig(path=path, quality="docs" if path == PYTHON_DOCS else "web")


def default_name(path: str) -> str:
    """`/data/pages.jsonl.zst` -> "pages": what documents of this input are called in statistics."""
    tail = path.rstrip("/").rsplit("/", 1)[-1].removeprefix("hf:")
    return tail.split(".", 1)[0] or tail or "input"
