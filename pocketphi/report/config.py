"""Configuration of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pocketphi.core.errors import ConfigError

PROMPTS = [
    "What is a plant?",
    "Why is the sky blue?",
    "What is the capital of France?",
    "Tell me a story about a dog.",
    "What is 2 plus 3?",
    "How does rain form?",
]


@dataclass
class ReportConfig:
    """What the page shows.

    title: heading of the page; None takes the name of the run's folder.
    prompts: questions the finished model answers on the page, greedily, so that the page can be
        repeated. max_new_tokens: longest answer.
    run_dir: folder with forecast.json and log.jsonl; None takes the parent of the output folder.
    max_lineage_bytes: most text of the corpus that is searched for documents close to an answer.
    price_per_hour_usd, watts: for the cost line; they are assumptions and are shown as such.
    """

    title: str | None = None
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    max_new_tokens: int = 64
    run_dir: Path | None = None
    max_lineage_bytes: int = 60_000_000
    price_per_hour_usd: float = 0.10
    watts: float = 30.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if self.max_lineage_bytes < 0 or self.price_per_hour_usd < 0 or self.watts < 0:
            raise ConfigError("max_lineage_bytes, price_per_hour_usd and watts cannot be negative")
