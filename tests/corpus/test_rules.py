"""Every rule on documents made for it: one that it must reject, one that it must keep."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from toy_pages import paragraph

from pocketphi.core.errors import UserError
from pocketphi.corpus import CorpusConfig, InputConfig, RuleConfig
from pocketphi.corpus.document import Document
from pocketphi.corpus.processing import Processor
from pocketphi.corpus.rules import bounds_for, rules, scores
from pocketphi.corpus.rules.batch import Batch, RuleContext
from pocketphi.corpus.rules.origin import load_url_lists
from pocketphi.corpus.rules.safety import replace_personal_data

PROSE = paragraph(1, 12)
SENTENCE = "The root takes up water and with it the salts that have to be in the soil."
ENGLISH = RuleContext(languages=("en",))


def judge(text: str, context: RuleContext = ENGLISH, **origin) -> dict[str, bool]:
    """Which rules keep a web document, by their default bounds."""
    document = Document("id", text, meta=dict(origin.pop("meta", {})), **origin)
    replace_personal_data(document)
    found = scores(Batch([document], context))
    return {
        name: bool(rules[name].min <= float(s[0]) <= np.float32(rules[name].max)) for name, s in found.items()
    }


LOW_LINES = "\n".join(f"item number {i} of the list" for i in range(40))
REJECTED = {
    "num_words": SENTENCE,
    "num_chars": "A line.",
    "mean_word_chars": "a b c " * 60,
    "symbols_per_word": f"{PROSE} " + "#tag and # more ... " * 40,
    "bullet_lines": "\n".join(f"- {paragraph(i, 1)}" for i in range(20)),
    "ellipsis_lines": "\n".join(f"{paragraph(i, 1)[:-1]}..." for i in range(10)),
    "letter_words": "2026 11 23 - 4 5 6 , 7.5 % " * 20,
    "stop_words": "Buy cheap pills online today. " * 30,
    "sentences": "a river and the sea with that " * 20,
    "braces_per_word": "function f() { return { a: { } } } " * 20,
    "lorem_ipsum": f"{PROSE} Lorem ipsum dolor sit amet.",
    "script_lines": f"Please enable JavaScript to see this page.\nThis site uses cookies.\n{PROSE}",
    "longest_word_chars": f"{PROSE} {'x' * 1200}",
    "ended_lines": "\n".join(f"{SENTENCE[:-1]} {i}" for i in range(20)),
    "short_lines": LOW_LINES,
    "lines_per_word": "\n".join(["one two"] * 60),
    "boilerplate_lines": "Share this on the web\nAll rights reserved\nSubscribe to our newsletter\n"
    + SENTENCE,
    "upper_case": PROSE.upper(),
    "duplicate_lines": f"{SENTENCE}\n" * 6,
    "duplicate_line_chars": f"{SENTENCE}\n" * 6,
    "duplicate_paragraphs": f"{SENTENCE}\n\n" * 6,
    "duplicate_paragraph_chars": f"{SENTENCE}\n\n" * 6,
    "language": "Die Wurzeln der Pflanze nehmen Wasser auf und leiten es durch den Stamm in die Blätter. "
    * 3,
    "pii_per_100_words": " ".join(f"Call {i}: mail person{i}@mail.de now." for i in range(40)),
    "unsafe_per_100_words": "porn pics xxx sluts porn whores " * 10,
    "unsafe_share": "I hate muslims and jews, they are filth and should be killed, the stupid bastards. " * 8,
}
REJECTED |= {f"top_{n}gram": "cold water again " * 40 for n in (2, 3, 4)}
REJECTED |= {f"repeated_{n}grams": f"{SENTENCE} " * 8 for n in range(5, 11)}


@pytest.mark.parametrize("name", sorted(REJECTED))
def test_a_document_made_for_a_rule_is_rejected_by_it(name: str) -> None:
    assert not judge(REJECTED[name])[name]


def test_every_rule_over_one_document_has_a_negative_example() -> None:
    origin = {"url_denied", "license_denied", "noai"}  # tested below and with the readers
    assert {name for name, item in rules.items() if item.function} == REJECTED.keys() | origin


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "# Roots\n\n"
        + PROSE.replace(". ", ".\n")
        + f"\n\n## Leaves\n\n- light\n- air\n\n```\ndef f(x):\n    return {{x: 1}}\n```\n\n{paragraph(2, 8)}",
        f"{PROSE}\n\n| Metal | Melts at |\n| --- | --- |\n| Iron | 1538 |\n| Tin | 232 |\n\nThe law is $E = mc^2$. {paragraph(3)}",
        "Sex in plants is decided by the flower. " + PROSE,  # a word that biology needs
        "We use no cookies here; our privacy is that of the reader. " + PROSE.replace(". ", ".\n"),
    ],
)
def test_good_documents_pass_every_rule(text: str) -> None:
    assert [name for name, keep in judge(text).items() if not keep] == []


def test_addresses_and_lists(tmp_path: Path) -> None:
    (tmp_path / "deny.txt").write_text("bad.org  # comment\nhttps://www.mixed.com/spam\n\n")
    context = RuleContext(url_deny=load_url_lists([str(tmp_path / "deny.txt")]))
    for url, keep in [
        ("https://bad.org/page", False),
        ("http://sub.bad.org", False),
        ("https://notbad.org/", True),
        ("https://www.mixed.com/spam/1", False),
        ("https://mixed.com/spammer", True),
        ("https://xxx.example.net/", False),
        ("https://essex.ac.uk/history", True),
        ("http://[broken", True),
        ("", True),
    ]:
        assert judge(PROSE, context, url=url)["url_denied"] == keep, url
    with pytest.raises(UserError, match="cannot read the URL list"):
        load_url_lists([str(tmp_path / "none.txt")])


def test_personal_data_is_replaced_and_counted() -> None:
    text = (
        "Write to Ann.Lee+x@mail.example.de or test@example.com, call +49 30 1234 5678 or (555) 867-5309, "
        "server 8.8.8.8 and 192.168.0.1, version 1.2.3.4 of 2026-11-23, key AKIAIOSFODNN7EXAMPLE, "
        "ISBN 978-3-16-148410-0, pages 100-200.\n"
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"
    )
    document = Document("id", text)
    replace_personal_data(document)
    for gone in ("Ann.Lee", "1234 5678", "867-5309", "8.8.8.8", "AKIAIOSF", "MIIEow"):
        assert gone not in document.text, gone
    for stays in ("test@example.com", "192.168.0.1", "2026-11-23", "978-3-16-148410-0", "pages 100-200"):
        assert stays in document.text, stays
    assert document.meta["pii"]["email"] == 1 and document.meta["pii"]["phone"] == 2
    assert document.meta["pii"]["key"] == 2
    clean = Document("id", PROSE)
    replace_personal_data(clean)
    assert clean.text == PROSE and "pii" not in clean.meta
    config = CorpusConfig(inputs=("x",), replace_pii=False)
    kept = Processor(config).document(InputConfig("x", name="x"), _raw(text))
    assert "Ann.Lee" in kept.text


def _raw(text: str):  # type: ignore[no-untyped-def]
    from pocketphi.corpus.document import Raw

    return Raw(where="x:1", text=text)


def test_scores_do_not_depend_on_the_company(tmp_path: Path) -> None:
    texts = [*REJECTED.values(), PROSE, "", "…", "日本語のテキストです。" * 20]
    together = scores(Batch([Document(str(i), text) for i, text in enumerate(texts)], ENGLISH))
    for i, text in enumerate(texts):
        alone = scores(Batch([Document(str(i), text)], ENGLISH))
        for name, column in alone.items():
            assert np.array_equal(column, together[name][i : i + 1], equal_nan=True), (name, text[:40])


def test_thresholds_move_by_configuration_and_by_source() -> None:
    source = InputConfig("x", name="x", rules={"num_words": RuleConfig(min=5)})
    config = CorpusConfig(
        inputs=(source,),
        rules={"num_words": RuleConfig(min=20, max=30), "sentences": RuleConfig(enabled=False)},
    )
    bounds = bounds_for(config, source)
    assert (bounds["num_words"].min, bounds["num_words"].max) == (5, 30)
    assert not bounds["sentences"].applies and bounds["sentences"].keep(0)
    assert (
        bounds["num_words"].keep(30)
        and not bounds["num_words"].keep(31)
        and bounds["num_words"].keep(float("nan"))
    )
    book = bounds_for(config, InputConfig("y", name="y", quality="textbook"))
    assert not book["num_words"].applies and book["language"].applies


@pytest.mark.parametrize(
    "text",
    [
        "a" * (1 << 18),
        "@" * (1 << 18),
        "a@" * (1 << 17),
        "1.1.1." * (1 << 15),
        "+1 23 " * (1 << 15),
        "-----BEGIN RSA PRIVATE KEY-----" * (1 << 13),
        "-----BEGIN PRIVATE KEY-----" * (1 << 13) + "-----END PRIVATE KEY-----",
        "-----END PRIVATE KEY-----" * (1 << 13),
        "\n" * (1 << 18) + PROSE,
        "a\n" * (1 << 17),
        ". " * (1 << 17),
        "eyJ" + "a" * (1 << 18),
        "\u0301" * (1 << 17),
    ],
    ids=lambda text: repr(text[:8]),
)
def test_hostile_texts_take_bounded_time(text: str) -> None:
    """A quarter of a megabyte each: no expression may take quadratic time."""
    started = time.process_time()
    judge(text)
    assert time.process_time() - started < 4
