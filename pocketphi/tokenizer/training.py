"""Train a vocabulary of Phi-3's form at any size: byte-pair encoding with byte fallback.

Layout of the ids: `<unk>` 0, `<s>` 1, `</s>` 2, the bytes 3..258, the pieces (merged ones by rank, then
single characters by frequency), and last the 64 added tokens in Phi-3's order, `<|endoftext|>` first.

Pieces never cross a word border, never mix letters with signs, and digits stand alone, so that every
number is read digit by digit. Line breaks are bytes, as in Llama 2. The trained file is of the form that
SentencePiece and llama.cpp know: a piece is reached through every cut into two pieces, best score first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from pocketphi.core import artifact, progress
from pocketphi.core.artifact import Artifact
from pocketphi.core.errors import ConfigError, DataError, UserError
from pocketphi.tokenizer import template as chat_template
from pocketphi.tokenizer.tokenizer import Tokenizer
from pocketphi.tokenizer.vocabulary import (
    ADDED_TOKENS,
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Vocabulary,
    phi3_rstrip,
    spm_definition,
)

_NUM_FIXED = 3 + len(BYTE_TOKENS) + len(ADDED_TOKENS)
# On the normalised text (blanks written U+2581): a word or a run of signs with the blank before it, a
# digit, and what is left of a run of blanks.
_WORDS = rf"{SPACE}+(?={SPACE})|{SPACE}?[\p{{L}}\p{{M}}]+|{SPACE}?[^\s{SPACE}\p{{L}}\p{{M}}\p{{N}}]+|{SPACE}|\p{{N}}"


@dataclass
class TokenizerConfig:
    """What to train.

    `vocab_size` counts everything, the 64 added tokens too. `max_bytes` bounds the text that is read
    (documents are drawn by the hash of their text, so that the sample is even and repeatable).
    `character_coverage` is the share of the text's characters that get a piece of their own; rarer ones
    are written as bytes.
    """

    vocab_size: int = 8192
    max_bytes: int = 20_000_000
    character_coverage: float = 0.9995
    max_piece_characters: int = 16
    template: str = chat_template.DEFAULT

    def __post_init__(self) -> None:
        if not _NUM_FIXED + 64 <= self.vocab_size <= 1_000_000:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; it must be from {_NUM_FIXED + 64} to 1000000 "
                f"({_NUM_FIXED} ids are fixed)"
            )
        if not 0.5 <= self.character_coverage <= 1:
            raise ConfigError(f"character_coverage is {self.character_coverage}; it must be from 0.5 to 1")
        if self.max_bytes < 1 or self.max_piece_characters < 1:
            raise ConfigError("max_bytes and max_piece_characters must be at least 1")
        missing = set(chat_template.named(self.template).tokens) - set(ADDED_TOKENS)
        if missing:
            raise ConfigError(f"template '{self.template}' needs {sorted(missing)}, which are not trained")


def run(
    config: TokenizerConfig, inputs: Mapping[str, Artifact | Path | str], *, out: Path | None = None
) -> Artifact:
    """Train on the kept documents of `inputs["corpus"]` and publish a `tokenizer` artifact.

    The corpus is a corpus artifact (held-out documents are left aside), or a file or folder of .txt and
    .jsonl (field `text`). Raises DataError when the text is too small for the vocabulary.
    """
    if "corpus" not in inputs:
        raise UserError("tokenizer: the input 'corpus' is missing")
    source = inputs["corpus"]
    parents: list[Artifact] = []
    sources: list[Path] = []
    if isinstance(source, Artifact) or (Path(source) / artifact.MANIFEST).exists():
        parents = [artifact.load(source, kind="corpus")]
        documents: Path = parents[0].path
    else:
        documents = Path(source)
        sources = text_files(documents)
    out = out or artifact.default_path("tokenizer", config, parents, sources)
    if done := artifact.reuse(out, kind="tokenizer", config=config, parents=parents, sources=sources):
        progress.say(f"tokenizer: up to date at {out}")
        return done
    with artifact.create(out, kind="tokenizer", config=config, parents=parents, sources=sources) as draft:
        texts, counts = sample(
            lambda: corpus_texts(documents) if parents else file_texts(sources), config.max_bytes
        )
        tokenizer = train(texts, config)
        tokenizer.save(draft.path)
        draft.counts.update(counts)
        draft.counts.update(measure(tokenizer, texts))
        draft.counts["vocab_size"] = tokenizer.vocab_size
    progress.say(
        f"tokenizer: {tokenizer.vocab_size} tokens, {draft.counts['bytes_per_token']:.2f} bytes per token "
        f"on its own text -> {out}"
    )
    return draft.artifact


def plan(config: TokenizerConfig, inputs_plan: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Forecast the run from the corpus' `tokens`: flat figures in SI units."""
    corpus = inputs_plan.get("corpus", {})
    read = min(4.0 * float(corpus.get("tokens", config.max_bytes / 4)), float(config.max_bytes))
    return {
        "wall_s": round(2 + read / 1e6, 1),
        "peak_memory_bytes": int(250e6 + 6 * read),
        "disk_bytes": int(config.vocab_size * 130),
        "vocab_size": config.vocab_size,
    }


def train(texts: list[str], config: TokenizerConfig) -> Tokenizer:
    """Train on texts in memory; the same texts and configuration give the same bytes.

    Raises DataError when the texts hold too little for the vocabulary.
    """
    num_pieces = config.vocab_size - _NUM_FIXED
    alphabet = _alphabet(texts, config.character_coverage, num_pieces // 4)
    if not alphabet:
        raise DataError("the tokenizer got no text to train on")
    # A rare character ends a word: it will be bytes, so no piece may contain it.
    rare = re.compile("[^" + re.escape("".join(c for c in alphabet if c != SPACE)) + " ]+")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(SPACE), tokenizers.normalizers.Replace(" ", SPACE)]
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s+"), "removed"),
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_pieces,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=alphabet,
        max_token_length=config.max_piece_characters,
    )
    backend.train_from_iterator((rare.sub("\n", t) for t in texts), trainer=trainer)
    trained: dict[str, int] = json.loads(backend.to_str())["model"]["vocab"]
    merged = [p for p, _ in sorted(trained.items(), key=lambda item: item[1]) if len(p) > 1]
    if len(merged) + len(alphabet) < num_pieces:
        raise DataError(
            f"the text gives only {len(merged) + len(alphabet)} pieces, vocab_size {config.vocab_size} "
            f"needs {num_pieces}",
            hint=f"give more text, or a vocab_size of at most {_NUM_FIXED + len(merged) + len(alphabet)}",
        )
    return assemble(merged[: num_pieces - len(alphabet)] + alphabet, config.template)


def assemble(pieces: list[str], template: str = chat_template.DEFAULT) -> Tokenizer:
    """Put a vocabulary together from its pieces, best first, and the fixed tokens."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *pieces, *ADDED_TOKENS]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * len(BYTE_TOKENS)
    kinds += [NORMAL] * len(pieces) + [CONTROL] * len(ADDED_TOKENS)
    scores = [0.0] * (3 + len(BYTE_TOKENS)) + [-float(i) for i in range(len(pieces))]
    scores += [0.0] * len(ADDED_TOKENS)
    definition = spm_definition(tokens, scores, kinds, rstrip=phi3_rstrip([*tokens[:3], *ADDED_TOKENS]))
    end = tokens.index("<|endoftext|>")
    vocabulary = Vocabulary(
        definition,
        num_rows=len(tokens),
        bos_id=1,
        eos_id=end,
        unk_id=0,
        pad_id=end,
        add_bos=False,
        template=template,
    )
    return Tokenizer(vocabulary)


def measure(tokenizer: Tokenizer, texts: list[str], max_bytes: int = 2_000_000) -> dict[str, float]:
    """Return how well the vocabulary fits (every n-th text, about `max_bytes` in all)."""
    total = sum(len(t) for t in texts)
    stride = max(1, -(-total // max_bytes))
    chosen = texts[::stride]
    num_bytes = sum(len(t.encode()) for t in chosen)
    encoded = tokenizer.encode_batch(chosen)
    num_tokens = sum(map(len, encoded))
    num_byte_tokens = sum(3 <= i < 259 for ids in encoded for i in ids)
    return {
        "bytes_per_token": round(num_bytes / max(1, num_tokens), 4),
        "byte_token_share": round(num_byte_tokens / max(1, num_tokens), 4),
    }


def _alphabet(texts: Iterable[str], coverage: float, limit: int) -> list[str]:
    """Return the characters that get a piece, most frequent first; ties by code point."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    blanks = counts.pop(" ", 0)
    for char in [c for c in counts if c.isspace() or c == SPACE or c == "\0"]:
        del counts[char]
    total = sum(counts.values())
    if not total:
        return []
    chosen: list[str] = []
    covered = 0
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= coverage * total or len(chosen) + 1 >= limit:
            break
        chosen.append(char)
        covered += count
    place = next((i for i, c in enumerate(chosen) if counts[c] < blanks), len(chosen))
    return [*chosen[:place], SPACE, *chosen[place:]]


# Reading the text


def sample(
    read: Callable[[], Iterable[str]], max_bytes: int, *, quiet: bool = False
) -> tuple[list[str], dict[str, int]]:
    """Return the texts of `read()` (called twice), thinned evenly to about `max_bytes`, and counts.

    Which texts are taken depends on their content alone. Raises DataError when there are none.
    """
    sizes = [len(t) for t in read()]
    total = sum(sizes)
    share = min(1.0, max_bytes / max(1, total))
    bound = int(share * 2**64)
    chosen = []
    for text in read():
        if share < 1:
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
            if int.from_bytes(digest, "big") >= bound:
                continue
        chosen.append(text)
    if not chosen and sizes:  # few and long texts, none of them drawn: the first will do
        chosen = [next(iter(read()))]
    if not chosen:
        raise DataError("no documents to train the tokenizer on", hint="look at the corpus: phi corpus stats")
    counts = {
        "documents_in": len(sizes),
        "documents_used": len(chosen),
        "characters_in": total,
        "characters_used": sum(map(len, chosen)),
    }
    if share < 1 and not quiet:
        progress.say(
            f"tokenizer: {len(chosen)} of {len(sizes)} documents are used (max_bytes {max_bytes} of {total})"
        )
    return chosen, counts


def corpus_texts(folder: Path) -> Iterator[str]:
    """Yield the kept, not held-out texts of a corpus folder, in order."""
    import pyarrow.parquet as pq

    parts = sorted((folder / "documents").glob("part-*.parquet"))
    if not parts:
        raise DataError(f"{folder / 'documents'}: no parts found")
    for part in parts:
        verdicts = folder / "verdicts" / part.name
        names = set(pq.read_schema(verdicts).names) if verdicts.is_file() else set()
        columns = [c for c in ("keep", "heldout") if c in names]
        marks = pq.read_table(verdicts, columns=columns).to_pydict() if columns else {}
        row = 0
        for batch in pq.ParquetFile(part).iter_batches(batch_size=512, columns=["text"]):
            for text in batch.column(0).to_pylist():
                keep = marks["keep"][row] if "keep" in marks else True
                heldout = marks["heldout"][row] if "heldout" in marks else False
                row += 1
                if keep and not heldout and text:
                    yield text


def text_files(path: Path) -> list[Path]:
    """Return the .txt and .jsonl files at a path; raises DataError when there are none."""
    found = [path] if path.is_file() else sorted(p for s in ("*.txt", "*.jsonl") for p in path.rglob(s))
    if not found:
        raise DataError(f"{path}: neither a corpus artifact nor text (.txt, .jsonl)")
    return found


def file_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield the texts of .txt files (whole) and .jsonl files (field `text` of each line)."""
    for file in files:
        try:
            if file.suffix != ".jsonl":
                yield file.read_text(encoding="utf-8")
                continue
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    row = json.loads(line)
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise DataError(f"{file}: line {number} has no field 'text'")
                    yield row["text"]
        except ValueError as error:
            raise DataError(f"{file}: not readable: {error}") from None
