"""The loader loses and repeats nothing, and row i is row i for every seed, batch and rank."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from pocketphi.core.errors import ConfigError
from pocketphi.train import shards
from pocketphi.train.data import IGNORE, Ahead, PackedFeed, Permutation


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000, 4097])
def test_permutation_visits_everything_once(n: int) -> None:
    order = Permutation(n, 7, 0)
    assert sorted(order(i) for i in range(n)) == list(range(n))
    if n > 16:
        assert [order(i) for i in range(n)] != [Permutation(n, 8, 0)(i) for i in range(n)]


def test_permutation_of_a_trillion_needs_no_memory() -> None:
    order = Permutation(10**12, 1)
    seen = {order(i) for i in range(1000)}
    assert len(seen) == 1000
    assert 0.4e12 < np.mean(list(seen)) < 0.6e12


@pytest.mark.parametrize("length", [1, 8, 33, 10_000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_predicts_every_token_once(toy_shards: Path, length: int, epoch: int) -> None:
    split = shards.open_split(toy_shards, "phase1")
    feed = PackedFeed(split, length, seed=3)
    batch = feed.batch(epoch * feed.rows_per_epoch, feed.rows_per_epoch)
    targets = batch.targets_BT[batch.targets_BT != IGNORE]
    assert len(targets) == split.num_tokens
    np.testing.assert_array_equal(np.bincount(targets), np.bincount(split.tokens))


def test_rows_are_the_documents_with_their_mask(toy_shards: Path) -> None:
    """Cut at the mask, rows of a whole epoch give back pieces of documents, each opened by the end
    token or by the token before it."""
    split = shards.open_split(toy_shards, "phase1")
    documents = [
        [split.eos_id, *split.tokens[int(a) : int(b)].tolist()]
        for a, b in zip(split.starts[:-1], split.starts[1:])
    ]
    text = " ".join(map(str, (i for d in documents for i in [*d, -1])))
    feed = PackedFeed(split, 50, seed=0)
    batch = feed.batch(0, feed.rows_per_epoch)
    for ids, targets, marks in zip(batch.ids_BT, batch.targets_BT, batch.documents_BT):
        for mark in np.unique(marks):
            inside = (marks == mark) & (targets != IGNORE)
            if not inside.any():
                continue
            piece = [*ids[inside].tolist(), int(targets[inside][-1])]
            np.testing.assert_array_equal(piece[1:], targets[inside])
            assert " ".join(map(str, piece)) in text
            assert split.eos_id not in piece[1:-1]


def test_batches_do_not_depend_on_how_they_are_asked_for(toy_shards: Path) -> None:
    split = shards.open_split(toy_shards, "phase1")
    mixture = {"text*": 0.5, "*": 0.5}
    whole = PackedFeed(split, 16, seed=4, mixture=mixture).batch(0, 300)
    feed = PackedFeed(split, 16, seed=4, mixture=mixture)
    for first in (299, 0, 130):
        one = feed.batch(first, 1)
        np.testing.assert_array_equal(one.ids_BT[0], whole.ids_BT[first])
        np.testing.assert_array_equal(one.targets_BT[0], whole.targets_BT[first])
        np.testing.assert_array_equal(one.documents_BT[0], whole.documents_BT[first])
    assert not np.array_equal(PackedFeed(split, 16, seed=5).batch(0, 20).ids_BT, whole.ids_BT[:20])


def test_mixture_keeps_its_weights_and_names_what_it_leaves_out(toy_shards: Path) -> None:
    split = shards.open_split(toy_shards, "phase1")
    feed = PackedFeed(split, 16, seed=4, mixture={"textbooks": 3, "web": 1})
    assert feed.unused == ["books"]
    assert feed._rows_before(1000, 0) == 750
    assert feed._rows_before(3000, 1) == 750
    only = PackedFeed(split, 16, seed=4, mixture={"textbooks": 1}).batch(0, 750).ids_BT
    known = {tuple(row) for row in only}
    assert 750 <= sum(tuple(row) in known for row in feed.batch(0, 1000).ids_BT) < 760
    assert any("books" in line and "not used" in line for line in feed.describe(1000))


def test_wrong_mixture_names_the_sources(toy_shards: Path) -> None:
    split = shards.open_split(toy_shards, "phase1")
    with pytest.raises(ConfigError, match=r"matches no source.*textbooks"):
        PackedFeed(split, 16, seed=0, mixture={"novels": 1})
    with pytest.raises(ConfigError, match="must be positive"):
        PackedFeed(split, 16, seed=0, mixture={"web": 0})


def test_batches_made_ahead_are_the_same_ones(toy_shards: Path) -> None:
    """In order, after a jump (a roll-back leaves rows out), and with what the feed raises."""
    feed = PackedFeed(shards.open_split(toy_shards, "phase1"), 16, seed=3)
    ahead = Ahead(PackedFeed(shards.open_split(toy_shards, "phase1"), 16, seed=3), 4)
    with contextlib.closing(ahead):
        for first in (0, 4, 8, 20, 24, 0):
            np.testing.assert_array_equal(ahead.batch(first, 4).ids_BT, feed.batch(first, 4).ids_BT)
        with pytest.raises(ValueError):
            ahead.batch(0, 0)
