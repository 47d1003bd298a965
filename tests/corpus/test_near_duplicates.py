"""Near-duplicates and recurring lines against brute force."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from pocketphi.core.errors import ConfigError, UserError
from pocketphi.corpus import minhash, near_duplicates, repeated_lines

THRESHOLD = 0.8
BANDING = minhash.Banding.for_threshold(THRESHOLD)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def similar_pairs(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    """Every pair (i < j) at or above the threshold, by counting shared shingles."""
    sets = [shingle_set(text) for text in texts]
    holders = defaultdict(list)
    found = set()
    for j, own in enumerate(sets):
        shared: dict[int, int] = defaultdict(int)
        for shingle in own:
            for i in holders[shingle]:
                shared[i] += 1
            holders[shingle].append(j)
        for i, count in shared.items():
            if count / (len(own) + len(sets[i]) - count) >= threshold:
                found.add((i, j))
    return found


def to_drop(num: int, pairs: set[tuple[int, int]], order: list[int]) -> set[int]:
    """Documents that have an earlier, staying document like them."""
    like = defaultdict(set)
    for i, j in pairs:
        like[i].add(j)
        like[j].add(i)
    stays: set[int] = set()
    for document in order:
        if not like[document] & stays:
            stays.add(document)
    return set(range(num)) - stays


def edited_copies(num_bases: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(3000)]
    texts = []
    for _ in range(num_bases):
        base = rng.choices(vocabulary, k=rng.randrange(60, 300))
        texts.append(" ".join(base))
        for _ in range(rng.randrange(4)):
            rate = rng.uniform(0.0, 0.06)
            copy = [rng.choice(vocabulary) if rng.random() < rate else word for word in base]
            texts.append(re.sub(r"\bword1", "Word1", ", ".join(copy)) + ".")
    rng.shuffle(texts)
    return texts


def run(texts, folder, *, kept=None, skip=None, size=64, memory_bytes=1 << 26, threshold=THRESHOLD):
    banding = minhash.Banding.for_threshold(threshold)

    def parts():
        for start in range(0, len(texts), size):
            chunk = texts[start : start + size]
            yield near_duplicates.PartKeys(
                start // size,
                minhash.band_keys(chunk, banding),
                [f"{i:032x}" for i in range(start, start + len(chunk))],
                np.ones(len(chunk), bool) if kept is None else kept[start : start + size],
                None if skip is None else skip[start : start + size],
            )

    table = near_duplicates.find(
        parts,
        lambda part: texts[part * size : (part + 1) * size],
        len(texts),
        folder,
        threshold=threshold,
        memory_bytes=memory_bytes,
    )
    answer = {}
    for part in table.parts:
        for row, (first, value) in table.of_part(part).items():
            answer[part * size + row] = (int(first, 16), value)
    assert len(table) == len(answer)
    return answer, table


def test_shingles_are_those_of_a_plain_definition():
    texts = [
        "The cat, the CAT; sat on the mat.",
        "one two",
        "",
        "  ...  ",
        "naïve café “quoted” — déjà vu 12,5",
        "a b c d e",
    ]
    for text, found in zip(texts, minhash.shingles(texts)):
        assert len(found) == len(shingle_set(text)), text
    same = minhash.shingles(["One two three four five six", "one, TWO (three) four-five\nsix!"])
    assert minhash.jaccard(*same) == 1.0
    assert minhash.jaccard(*minhash.shingles(["page one of the book here", "page 1 of the book here"])) < 1


def test_shingles_do_not_depend_on_the_batch():
    texts = edited_copies(30)
    together = minhash.shingles(texts)
    keys = minhash.band_keys(texts, BANDING)
    for i in (0, 7, len(texts) - 1):
        assert np.array_equal(minhash.shingles([texts[i]])[0], together[i])
        assert np.array_equal(minhash.band_keys([texts[i]], BANDING)[0], keys[i])


def test_one_hash_agrees_as_often_as_the_sets_are_similar():
    texts = edited_copies(60, seed=3)
    keys = minhash.band_keys(texts, minhash.Banding(128, 1))
    sets = minhash.shingles(texts)
    errors = []
    for i, j in similar_pairs(texts, 0.3):
        truth = minhash.jaccard(sets[i], sets[j])
        errors.append((keys[i] == keys[j]).mean() - truth)
    assert len(errors) > 60
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06  # binomial: about 0.044 at most


def test_banding_reaches_its_recall():
    for threshold in (0.5, 0.7, 0.8, 0.9):
        banding = minhash.Banding.for_threshold(threshold)
        assert banding.recall(threshold) >= 0.99
        assert banding.num_hashes <= 128
    with pytest.raises(ConfigError):
        minhash.Banding.for_threshold(1.5)


def test_recall_and_precision_against_brute_force(tmp_path: Path):
    texts = edited_copies(250, seed=1)
    answer, _ = run(texts, tmp_path)
    pairs = similar_pairs(texts, THRESHOLD)
    truth = to_drop(len(texts), pairs, list(range(len(texts))))
    assert len(truth) > 100
    assert len(truth & answer.keys()) / len(truth) >= 0.95
    for document, (stays, value) in answer.items():
        assert (min(document, stays), max(document, stays)) in pairs
        assert stays < document and stays not in answer
        assert value >= THRESHOLD
    assert len(answer.keys() & truth) / len(answer) >= 0.95


def test_small_memory_gives_the_same_answer_in_more_passes(tmp_path: Path, monkeypatch):
    texts = edited_copies(120, seed=2)
    whole, one = run(texts, tmp_path / "whole")
    monkeypatch.setattr(near_duplicates, "_MIN_MEMORY_BYTES", 1)
    small, many = run(texts, tmp_path / "small", memory_bytes=6000)
    assert many.counts["passes"] > one.counts["passes"]
    assert many.counts["pair_passes"] > 1
    assert small == whole


def test_kept_documents_are_never_dropped_for_rejected_ones(tmp_path: Path):
    base = " ".join(f"term{i}" for i in range(80))
    texts = [base, base + " end", "something else " * 3, base + " fin"]
    kept = np.array([False, True, True, True])
    answer, _ = run(texts, tmp_path / "a", kept=kept)
    assert answer.keys() == {0, 3} and answer[0][0] == 1 and answer[3][0] == 1
    answer, _ = run(texts, tmp_path / "b", skip=np.array([False, True, False, False]))
    assert answer.keys() == {3} and answer[3][0] == 0


def test_large_buckets_stay_linear(tmp_path: Path):
    rng = random.Random(5)
    base = [f"term{i}" for i in range(120)]
    texts = []
    for _ in range(400):
        copy = list(base)
        copy[rng.randrange(120)] = f"odd{rng.random()}"
        texts.append(" ".join(copy))
    answer, table = run(texts, tmp_path)
    assert len(answer) >= 0.97 * (len(texts) - 1)
    assert table.counts["large_buckets"] > 0
    assert table.counts["candidate_pairs"] < 60 * len(texts)  # all pairs would be 79800


def test_texts_without_words_are_not_alike(tmp_path: Path):
    answer, _ = run(["", "...", "", "word"], tmp_path)
    assert answer == {}


def test_too_little_memory_is_an_error_with_the_number(tmp_path: Path):
    with pytest.raises(UserError, match=r"need \d+ bytes") as caught:
        run(["a b c"] * 10, tmp_path, memory_bytes=1000)
    assert "dedup_memory_bytes" in (caught.value.hint or "")


def lines_table(documents, tmp_path, **keywords):
    def parts():
        for start in range(0, len(documents), 4):
            chunk = documents[start : start + 4]
            yield repeated_lines.PartLines(
                start // 4, [repeated_lines.line_records(text, url) for text, url in chunk]
            )

    table = repeated_lines.find(parts, len(documents), tmp_path / "shares.bin", **keywords)
    return np.concatenate([table.of_part(part) for part in table.parts]), table


def test_recurring_lines_of_a_site(tmp_path: Path, monkeypatch):
    menu = "Home | About | Contact us"
    documents = []
    for i in range(10):
        body = f"A paragraph of its own, number {i}, which nobody repeats."
        documents.append((f"{menu}\n{body}\n", f"https://www.example.org/{i}"))
        documents.append((f"  home | about |  CONTACT us\n{body}\n", f"http://other{i}.net/"))
    documents.append((menu, ""))
    shares, table = lines_table(documents, tmp_path)
    expected = len(menu) / len(documents[0][0].replace("\n", ""))
    assert np.allclose(shares[0:20:2], expected, atol=0.01)
    assert (shares[1:20:2] == 0).all() and shares[20] == 0
    assert table.counts["recurring_lines"] == 1
    monkeypatch.setattr(repeated_lines, "_MIN_MEMORY_BYTES", 1)
    again, many = lines_table(documents, tmp_path, memory_bytes=len(documents) * 8 + 100)
    assert many.counts["line_passes"] > 5
    assert np.array_equal(again, shares)


def test_a_line_repeated_inside_one_document_does_not_recur(tmp_path: Path):
    documents = [
        ("again\n" * 50, "http://a.org/1"),
        ("other\n", "http://a.org/2"),
        ("third\n", "http://a.org/3"),
    ]
    shares, _ = lines_table(documents, tmp_path)
    assert (shares == 0).all()


@pytest.mark.parametrize(
    ("url", "site"),
    [
        ("https://www.Example.org:8080/a?b", "example.org"),
        ("example.com/x", "example.com"),
        ("", ""),
        ("file:///tmp/x", ""),
        ("http://[broken", ""),
    ],
)
def test_site_of(url: str, site: str):
    assert repeated_lines.site_of(url) == site


@pytest.mark.parametrize("paired", [False, True])
def test_memory_stays_within_the_budget(tmp_path: Path, monkeypatch, paired: bool):
    """Many documents with prepared keys, few in buckets or all: what `find` allocates stays within the budget."""
    num, size, budget = 16_000, 500, 1 << 20
    monkeypatch.setattr(near_duplicates, "_MIN_MEMORY_BYTES", 1 << 19)
    text = " ".join(f"t{i}" for i in range(12))

    def parts():
        for start in range(0, num, size):
            keys = np.random.default_rng(start).integers(1, 1 << 63, size=(size, 4), dtype=np.uint64)
            if paired:
                keys[1::2] = keys[::2]
            else:
                keys[::50, 0] = start + 1
            ids = [f"{i:032x}" for i in range(start, start + size)]
            yield near_duplicates.PartKeys(start // size, keys, ids, np.ones(size, bool))

    monkeypatch.setattr(minhash.Banding, "for_threshold", classmethod(lambda cls, threshold: cls(4, 1)))
    minhash.shingles([text])  # tables that a run of any size needs
    tracemalloc.start()
    try:
        near_duplicates.find(parts, lambda part: [text] * size, num, tmp_path, memory_bytes=budget)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < budget
