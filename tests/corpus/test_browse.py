"""The browser page: its counts are the corpus's, in a real browser, and no text of the corpus is ever run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import headless_chromium
import numpy as np
import pytest
from toy_pages import paragraph

from pocketphi import corpus
from pocketphi.core.errors import UserError
from pocketphi.corpus import CorpusConfig, InputConfig
from pocketphi.corpus.browse import page_data, write_page
from pocketphi.corpus.rules import rules

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<!--<script>&lt;b&gt; \u2028 [[SCRIPT]] [[DATA]]"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("browse")
    lines = [{"id": f"r{i}", "url": f"https://a.org/{i}", "text": paragraph(i, 1 + i % 9)} for i in range(90)]
    lines += [{"id": "hostile", "url": "https://evil.org/'\"><b>", "text": f"{HOSTILE} {paragraph(500, 8)}"}]
    lines += [  # long enough but for their number of words
        {
            "url": f"https://b.org/{i}",
            "text": f"The plant number {i} grows with the sun. It rests at night. That is all of it.",
        }
        for i in range(5)
    ]
    (folder / "web.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    (folder / "books.jsonl").write_text(
        "".join(json.dumps({"text": paragraph(700 + i, 1)}) + "\n" for i in range(12))
    )
    config = CorpusConfig(
        inputs=(str(folder / "web.jsonl"), InputConfig(str(folder / "books.jsonl"), quality="textbook")),
        workers=1,
        chunk_documents=40,
        heldout_fraction=0.0,
    )
    return corpus.run(config, {}, out=folder / "corpus")


def all_rows(built) -> list[dict]:
    columns = ["id", "meta", "keep", "reasons", "num_words.score"]
    return [row for batch in corpus.read(built, columns, keep=None) for row in batch.to_pylist()]


def kept_with_words(built, low: float, high: float) -> int:
    """How many documents a corpus built with these bounds of num_words would keep."""
    count = 0
    for row in all_rows(built):
        web = json.loads(row["meta"])["input"] == "web"
        others = set(row["reasons"]) - {"num_words"}
        count += not others and (not web or low <= row["num_words.score"] <= high)
    return count


def test_counts_of_the_page_are_those_of_the_corpus(built) -> None:
    data = page_data(built, 40)
    assert data["totals"] == {
        "kept": built.counts["documents_kept"],
        "rejected": built.counts["documents_rejected"],
    }
    for name, entry in data["rules"].items():
        edges = np.array([-np.inf, *entry["edges"][1:]])
        decided = np.array(entry["decided"])
        low = np.float32(-np.inf if entry["min"] is None else entry["min"])
        high = np.float32(np.inf if entry["max"] is None else entry["max"])
        inside = decided[(edges >= low) & (edges <= high)].sum()
        assert inside + entry["unjudged_kept"] == built.counts["documents_kept"], name
        alone = decided.sum() - inside
        assert alone == corpus.stats(built)["rules"][name]["rejected_alone"], name


def test_the_sample_is_bounded_and_reaches_the_borders(built) -> None:
    data = page_data(built, 10)
    shown = {document["id"]: document for document in data["documents"]}
    near = sorted(all_rows(built), key=lambda row: abs(row["num_words.score"] - rules["num_words"].min))
    judged = [row for row in near if json.loads(row["meta"])["input"] == "web"]
    decided = [row for row in judged if row["reasons"] in ([], ["num_words"])]
    assert decided[0]["id"] in shown
    assert len(shown) < 70
    assert page_data(built, 10) == data


def test_the_page_does_not_go_into_the_corpus(built) -> None:
    with pytest.raises(UserError, match="inside the corpus"):
        write_page(built, built.path / "page.html")


def test_hostile_text_stays_inside_its_string(built, tmp_path: Path) -> None:
    write_page(built, tmp_path / "page.html", num_documents=400)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    texts = [document["text"] for document in json.loads(block)["documents"]]
    assert sum(text.startswith("</script><script>") for text in texts) == 1
    assert not re.search(r"https?://(?!a\.org|b\.org|evil\.org|www\.w3\.org)", page)  # nothing is fetched


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[headless_chromium.Page]:
    executable = headless_chromium.find()
    if executable is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    page = headless_chromium.Page(executable, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def move(browser: headless_chromium.Page, slider: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const s = document.getElementById('{slider}'); s.value = {value};"
        " s.dispatchEvent(new Event('input')); })()"
    )


def test_the_page_in_chromium(built, browser: headless_chromium.Page, tmp_path: Path) -> None:
    write_page(built, tmp_path / "page.html", num_documents=400)
    browser.open(tmp_path / "page.html")
    kept = built.counts["documents_kept"]
    total = kept + built.counts["documents_rejected"]

    def text(identifier: str) -> str:
        return browser.evaluate(f"document.getElementById('{identifier}').textContent")

    assert text("totals").startswith(f"{kept} kept, {total - kept} rejected, 1 failed: 1 × not valid JSON")
    assert text("effect") == f"{kept} of {total} documents kept (as built)"
    browser.evaluate(
        "(() => { const s = document.getElementById('rule'); s.value = 'num_words';"
        " s.dispatchEvent(new Event('change')); })()"
    )
    assert text("min-value") == "50"
    # All are in the sample: the columns hold what the corpus holds (at most 60 are drawn).
    assert text("kept-title").startswith(f"Kept: {kept} ") and text("rejected-title").startswith(
        f"Rejected: {total - kept} "
    )

    # Another threshold: the page says what a corpus built with it would keep.
    bars = browser.evaluate("document.querySelectorAll('#histogram rect.decided:not(.outside)').length")
    index = browser.evaluate("data.rules.num_words.edges.findIndex((edge) => edge > 90)")
    low = browser.evaluate(f"data.rules.num_words.edges[{index}]")
    move(browser, "min", str(index))
    expected = kept_with_words(built, low, 100_000)
    assert 0 < expected < kept
    assert (
        text("effect")
        == f"{expected} of {total} documents kept (-{kept - expected} against the corpus as built)"
    )
    assert text("kept-title").startswith(f"Kept: {expected} ")
    changed = browser.evaluate("document.querySelectorAll('#rejected article.changed').length")
    assert changed == min(kept - expected, 60)
    assert (
        browser.evaluate("document.querySelector('#rejected article.changed p').textContent")
        == "would be rejected"
    )
    assert (
        browser.evaluate("document.querySelectorAll('#histogram rect.decided:not(.outside)').length") < bars
    )

    move(browser, "min", "0")
    expected = kept_with_words(built, -np.inf, 100_000)
    assert expected > kept and f"{expected} of {total}" in text("effect")
    browser.evaluate("document.getElementById('reset').click()")
    assert text("effect").endswith("(as built)")

    # Nearest to the threshold first.
    scores = browser.evaluate(
        "[...document.querySelectorAll('#kept article p')].map((p) => p.textContent.match(/num_words (\\d+)/))"
        ".filter(Boolean).map((m) => Number(m[1]))"
    )
    distances = [min(abs(score - 50), abs(score - 100_000)) for score in scores]
    assert len(distances) > 10 and distances == sorted(distances)

    # Find the hostile document: it is shown as text, and nothing of it ran or was fetched.
    browser.evaluate(
        "(() => { const s = document.getElementById('find'); s.value = 'onerror';"
        " s.dispatchEvent(new Event('input')); })()"
    )
    shown = browser.evaluate("[...document.querySelectorAll('article pre')].map((p) => p.textContent)")
    assert len(shown) == 1 and "<img src=x onerror=" in shown[0] and "</script><script>" in shown[0]
    assert browser.evaluate("document.title") == "corpus"
    assert browser.evaluate("document.images.length") == 0
    problems = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not problems, problems
    fetched = [
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert fetched == [(tmp_path / "page.html").as_uri()]


def test_the_policy_stops_scripts_that_are_not_the_pages_own(
    built, browser: headless_chromium.Page, tmp_path: Path
) -> None:
    """Had some text come through as markup, it would still not run."""
    write_page(built, tmp_path / "page.html", num_documents=10)
    broken = (tmp_path / "page.html").read_text().replace("<main>", f"<main>{HOSTILE}", 1)
    (tmp_path / "broken.html").write_text(broken)
    browser.open(tmp_path / "broken.html")
    assert browser.evaluate("document.title") != "owned"
    assert browser.evaluate("document.images.length") == 1
