"""Guessing from the text itself: what is proposed, how much of it, and what is learned."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pocketphi.engine.lookup import Lookup, step_time


def _runs(ids: list[int]) -> dict[int, int]:
    """Every place that may be copied from -> the length of the run before it, as the end of the text has it."""
    found = {}
    for at in range(1, len(ids)):
        run = 0
        while run < min(8, at) and ids[at - run - 1] == ids[-run - 1]:
            run += 1
        if run:
            found[at] = run
    return found


@settings(max_examples=400, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    limit=st.integers(0, 20),
    max_draft=st.integers(1, 12),
)
def test_proposes_what_followed_the_longest_run(ids: list[int], limit: int, max_draft: int) -> None:
    draft = Lookup(ids, max_draft).propose(limit)
    runs = _runs(ids)
    assert len(draft) <= min(limit, max_draft)
    if draft:
        longest = max(runs.values())
        assert any(run == longest and ids[at : at + len(draft)] == draft for at, run in runs.items())
    elif limit and runs and max(runs.values()) >= 2:
        raise AssertionError("two tokens that stood together before are worth a guess")


def test_copying_raises_the_number_and_failing_ends_it() -> None:
    text = list(range(100, 160))
    lookup = Lookup([*text, 7, *text[:2]], max_draft=11)
    sizes, at = [], 2
    while at < 50:
        draft = lookup.propose(20)
        assert draft == text[at : at + len(draft)]
        sizes.append(len(draft))
        for token in draft:
            lookup.push(token)
        lookup.learn(len(draft), len(draft))
        at += len(draft)
    assert sizes[0] >= 2 and max(sizes) > sizes[0] and lookup.num_accepted == lookup.num_drafted == sum(sizes)
    # The same single token, followed by another one each time: guessing from it ends.
    lookup, tries = Lookup([5, 0], max_draft=11), 0
    for new in range(1000, 1060):
        lookup.push(5)
        draft = lookup.propose(20)
        tries += bool(draft)
        if draft:
            lookup.learn(len(draft), 0)
        lookup.push(new)
    assert 0 < tries < 30 and lookup.propose(20) == []


def test_after_an_edit_copying_goes_on_where_it_was() -> None:
    """Of the places that agree equally long the one that follows what was copied is taken."""
    text = [1, 50, 51, 52, 9, 60, 61, 62, 9, 70, 71, 72, 9, 80, 81]
    lookup = Lookup([*text, 1, 50, 51], max_draft=2)
    assert lookup.propose(2) == [52, 9]
    for token in (52, 9, 60):
        lookup.push(token)
    assert lookup.propose(2) == [61, 62]
    for token in (61, 99, 9):  # 62 was replaced
        lookup.push(token)
    assert lookup.propose(1) == [70]


def test_others_in_the_step_make_guesses_dearer() -> None:
    ids = [*range(30), *range(10)]
    alone = len(Lookup(ids, 11).propose(20))
    assert alone == 11 or alone == 5
    assert len(Lookup(ids, 11).propose(20, beside=40)) <= alone
    assert Lookup([3, 4, 3], 11).propose(20) and not Lookup([3, 4, 3], 11).propose(20, beside=7)
    assert step_time(1, 6) == 1 and step_time(7, 6) - step_time(6, 6) > 5 * (
        step_time(6, 6) - step_time(5, 6)
    )
