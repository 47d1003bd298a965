"""Extraction: what educational text depends on is kept, furniture is not, hostile pages do no harm."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketphi.corpus.extraction import TooManyNodes, decode, extract

WORDS = "Plants take up water through their roots, and light through their leaves, to make sugar and air. "


def article(inner: str) -> str:
    return f"<html><body><article><p>{WORDS * 3}</p>{inner}<p>{WORDS * 3}</p></article></body></html>"


def test_headings_and_lists() -> None:
    text = extract(
        article(
            "<h2>Two steps</h2><ul><li>first<ul><li>inner</li></ul></li><li>second</li></ul>"
            "<h3>In order</h3><ol start=3><li>three</li><li><p>four</p></li></ol>"
        )
    ).text
    assert "## Two steps\n\n- first\n  - inner\n- second\n\n### In order\n\n3. three\n4. four" in text


def test_tables_keep_rows_and_columns() -> None:
    text = extract(
        article(
            "<table><caption>Melting points</caption><tr><th>Metal</th><th>°C</th></tr>"
            "<tr><td>Iron</td><td>1538</td></tr><tr><td>Tin | lead</td><td><b>183</b></td></tr></table>"
        )
    ).text
    assert "Melting points\n\n| Metal | °C |\n| --- | --- |\n| Iron | 1538 |\n| Tin \\| lead | 183 |" in text


def test_layout_tables_are_not_tables() -> None:
    inner = f"<table><tr><td>menu</td><td><p>{WORDS * 2}</p><p>{WORDS * 2}</p></td></tr></table>"
    text = extract(f"<html><body>{inner}</body></html>").text
    assert text.count(WORDS.strip()) == 4 and "|" not in text


def test_code_keeps_lines_and_indentation() -> None:
    code = "def f(x):\n    if x &lt; 1:\n        return <b>0</b>\n    return 1"
    text = extract(article(f"<p>Use <code>f(3)</code>:</p><pre><code>{code}</code></pre>")).text
    assert "```\ndef f(x):\n    if x < 1:\n        return 0\n    return 1\n```" in text
    lines = "".join(f"<div>line {i}</div>" for i in range(3))
    assert "```\nline 0\nline 1\nline 2\n```" in extract(article(f"<pre>{lines}</pre>")).text


@pytest.mark.parametrize(
    ("markup", "latex"),
    [
        ("<math><mfrac><mi>a</mi><msup><mi>b</mi><mn>2</mn></msup></mfrac></math>", r"$\frac{a}{b^2}$"),
        ("<math><msqrt><mi>x</mi><mo>+</mo><mn>1</mn></msqrt></math>", r"$\sqrt{x + 1}$"),
        ("<math display='block'><msub><mi>x</mi><mi>i</mi></msub></math>", "$$x_i$$"),
        ("<math><semantics><mi>x</mi><annotation encoding='application/x-tex'>E=mc^2</annotation></semantics></math>",
         "$E=mc^2$"),
        ("<math alttext='{\\displaystyle a^{2}}'><mi>a</mi></math>", "$a^{2}$"),
        ("<span class='katex'><span class='katex-mathml'><math><semantics><mrow><mi>y</mi></mrow>"
         "<annotation encoding='application/x-tex'>y=1</annotation></semantics></math></span>"
         "<span class='katex-html' aria-hidden='true'>y=1 drawn</span></span>", "$y=1$"),
        ("<script type='math/tex; mode=display'>\\sum_i i</script>", r"$$\sum_i i$$"),
        ("<img class='mwe-math-fallback-image-inline' alt='{\\displaystyle \\pi r^{2}}'>", r"$\pi r^{2}$"),
        ("<img class='latex' alt='$\\alpha$'>", r"$\alpha$"),
        ("<math><munderover><mo>∑</mo><mi>i</mi><mi>n</mi></munderover><mi>sin</mi><mi>θ</mi></math>",
         r"$\sum_i^n \sin \theta$"),
    ],
)  # fmt: skip
def test_formulas_become_latex(markup: str, latex: str) -> None:
    text = extract(article(f"<p>We find {markup} here.</p>")).text
    assert f"We find {latex} here." in text


def test_formula_in_a_table_cell() -> None:
    text = extract(
        article(
            "<table><tr><td>area</td><td><math><mi>r</mi></math></td></tr><tr><td>a</td><td>b</td></tr></table>"
        )
    ).text
    assert "| area | $r$ |" in text


def test_powers_and_indices() -> None:
    text = extract(
        article("<p>10<sup>3</sup> m<sup>2</sup>, H<sub>2</sub>O, on the 4<sup>th</sup> day.</p>")
    ).text
    assert "10^3 m^2, H2O, on the 4th day." in text


def test_furniture_is_left_out() -> None:
    page = (
        "<html><head><title>T</title><style>p {}</style></head><body><nav><a href=/>Home</a></nav>"
        "<div class='cookie-banner'><p>We value your privacy and use cookies to give you the best of it all.</p></div>"
        f"<div id=content><h1>T</h1><p>{WORDS * 4}</p><script>var x = 1;</script><p>{WORDS * 4}</p>"
        "<div class='share-buttons'><a href=/s>Share</a></div></div>"
        "<div class=sidebar><ul><li><a href=/1>One of many other stories</a></li></ul></div>"
        f"<div class=comments><p>I do not agree at all with this article, and so on.</p></div>"
        "<footer><p>All rights reserved by the people who made this page, in the year 2020.</p></footer></body></html>"
    )
    found = extract(page)
    assert found.title == "T" and found.text == f"{(WORDS * 4).strip()}\n\n{(WORDS * 4).strip()}"


def test_the_lead_above_the_article_is_put_back() -> None:
    """In a frame of its own under the title; a caption there, or a person's life, is no lead."""
    lead = "Leaves are factories: what they make of light feeds nearly all that lives on land."
    page = (
        "<html><body><header><h1>Leaves</h1><div class='teaser'><p>{lead}</p></div>{more}</header>"
        f"<div class='article-body'><p>{WORDS * 4}</p><p>{WORDS * 4}</p></div></body></html>"
    )
    more = f"<div class='photo-caption'><p>A leaf in the hand of a child. {WORDS}</p></div>"
    more += (
        "<div class='author-bio'><p>Ann Lee has written about plants for many years, in this paper.</p></div>"
    )
    assert extract(page.format(lead=lead, more=more)).text == "\n\n".join([lead] + [(WORDS * 4).strip()] * 2)
    assert extract(page.format(lead="By Ann Lee", more="")).text == "\n\n".join([(WORDS * 4).strip()] * 2)


def test_notes_around_the_text_are_trimmed_and_short_text_is_not() -> None:
    body = f"<p>{WORDS * 3}</p><p>An aside</p><h2>See also</h2><ul><li>Roots</li></ul><p>{WORDS * 3}</p>"
    found = extract(
        f"<html><body><article><p>Updated 3 May 2021</p><p>5 min read</p>{body}<p>Photo: A. Lee</p><p>apl/dpa</p>"
        "</article></body></html>"
    ).text
    assert found == "\n\n".join(
        [(WORDS * 3).strip(), "An aside", "## See also", "- Roots", (WORDS * 3).strip()]
    )
    # A formula, a sentence that goes on, and a line before a list are text, however short.
    for first in (
        "<p>When</p><p>, and they are</p>",
        "<p>$$x = 1$$</p>",
        "<p>You need:</p><ul><li>sugar</li></ul>",
    ):
        kept = extract(f"<html><body><article>{first}<p>{WORDS * 4}</p></article></body></html>").text
        assert not kept.startswith(WORDS[:20])


def test_a_pointer_to_another_article_ends_only_the_end() -> None:
    pointer = "<h4>Lesen Sie auch</h4><p><a href='/x'>Wie Wurzeln trinken</a></p>"
    middle = extract(article(pointer + f"<p>{WORDS * 2}</p>")).text
    assert "Lesen" not in middle and middle.count(WORDS.strip()) == 8
    assert "newsletter" not in extract(article("<p>Sign up <a href=/n>here</a> for our newsletter!</p>")).text
    # The same words in a lesson are the lesson.
    for text in (
        "Clients subscribe to a channel and get its updates.",
        "Follow the steps on page 3.",
        "Copyright protects works, not ideas.",
        "(c) the third answer",
    ):
        assert text in extract(article(f"<p>{text}</p>")).text


def test_names_of_layouts_do_not_hide_the_article() -> None:
    inner = f"<p>{WORDS * 5}</p><p>{WORDS * 5}</p>"
    for names in (
        "sidebar-grid__content",
        "has-comments modal-enabled",
        "article-widget",
        "post-share-layout",
    ):
        assert WORDS.strip() in extract(f"<html><body><div class='{names}'>{inner}</div></body></html>").text


def test_the_main_part_is_found_in_any_frame() -> None:
    inner = f"<main><p>{WORDS * 5}</p></main>"
    around = f"<div class='x'><p>{WORDS.lower() * 4}</p></div>"
    page = f"<html><body><div class='dialog-off-canvas-main-canvas'>{inner}</div>{around}</body></html>"
    assert (WORDS * 5).strip() in extract(page).text


def test_soft_hyphens_are_taken_out() -> None:
    assert "photosynthesis" in extract(article("<p>About photo&shy;syn&shy;thesis, in short.</p>")).text


def test_hidden_text_is_left_out() -> None:
    text = extract(article("<p style='display: none'>secret</p><div hidden>secret</div><p>seen</p>")).text
    assert "secret" not in text and "seen" in text


def test_pages_sent_in_pieces_are_put_together() -> None:
    """The text waits in a hidden part until a script moves it; a hidden part beside real text stays hidden."""
    hidden = f"<div hidden id='S:0'><main><h2>Leaves</h2><p>{WORDS * 4}</p></main></div>"
    assert WORDS.strip() in extract(f"<html><body><div>Loading</div>{hidden}</body></html>").text
    assert "Leaves" not in extract(article(hidden)).text


def test_data_in_a_template_is_not_text() -> None:
    data = '<script type=\'text/template\'>{"caption": "<p>not of the page"}</script>'
    markup = f"<script type='text/template'><div><p>{WORDS}</p></div></script>"
    text = extract(article(data + markup)).text
    assert "caption" not in text and text.count(WORDS.strip()) == 7


def test_article_kept_in_metadata_is_found() -> None:
    data = json.dumps(
        {"@graph": [{"@type": "Article", "articleBody": f"<p>{WORDS * 5}</p><p>End &amp; out.</p>"}]}
    )
    page = f"<html><body><script type='application/ld+json'>{data}</script><p>Please wait.</p></body></html>"
    assert extract(page).text == f"{(WORDS * 5).strip()}\n\nEnd & out."


def test_head_is_read() -> None:
    page = extract(
        "<html><head><title> A &amp; B </title><meta name=robots content='index, NoAI'>"
        "<link rel=canonical href='https://a.org/b'><link rel=license href='https://creativecommons.org/licenses/by/4.0/'>"
        "</head><body><p>x</p></body></html>"
    )
    assert (page.title, page.noai, page.url) == ("A & B", "noai", "https://a.org/b")
    assert page.license == "https://creativecommons.org/licenses/by/4.0/"
    linked = extract(article("<p><a href='https://creativecommons.org/licenses/by-sa/3.0/de/'>CC</a></p>"))
    assert linked.license == "https://creativecommons.org/licenses/by-sa/3.0"


@pytest.mark.parametrize(
    ("content", "charset", "expected"),
    [
        ("Ä€".encode(), "", ("Ä€", "utf-8")),
        (b"\xff\xfe" + "Ä".encode("utf-16-le"), "", ("Ä", "utf-16-le")),
        ("<meta charset=iso-8859-1>Ä".encode("latin-1"), "", ("<meta charset=iso-8859-1>Ä", "cp1252")),
        ("Привет, мир. Это русский текст.".encode("cp1251"), "windows-1251",
         ("Привет, мир. Это русский текст.", "cp1251")),
        ("Ende €".encode()[:-1], "", ("Ende ", "utf-8")),
        (b"a" * 1000 + b"\xff", "utf-8", ("a" * 1000 + "\ufffd", "utf-8")),
    ],
)  # fmt: skip
def test_charsets(content: bytes, charset: str, expected: tuple[str, str]) -> None:
    assert decode(content, charset) == expected


@pytest.mark.parametrize(
    "page",
    [
        "",
        " \n",
        "no tags at all",
        "<html><body><p>cut off in the mid",
        "<p>a\0b</p>",
        "<p>\ud800 surrogate</p>",
        "<div>" * 50_000 + "deep",
        "<table><tr><td>" * 5_000 + "deep",
        "<ul><li>" * 5_000 + "deep",
        "<blockquote>" * 5_000 + "deep",
        "<math>" + "<mrow>" * 5_000 + "<mi>x</mi>",
        "<" * 100_000,
        "&amp;" * 100_000,
        "<!--" + "x" * 100_000,
        "<p class='" + "-side" * 20_000 + "'>names</p>",
        "<script type='application/ld+json'>" + "[" * 100_000 + '"articleBody"</script>',
        "<p>" + " " * 1_000_000 + "</p>",
    ],
    ids=lambda page: repr(page[:24]),
)
def test_hostile_pages_do_no_harm(page: str) -> None:
    assert isinstance(extract(page).text, str)


def test_number_of_elements_is_bounded() -> None:
    with pytest.raises(TooManyNodes):
        extract("<p>" + "<i>a</i>" * 2_000 + "</p>", max_nodes=1_000)


_PIECES = st.sampled_from(
    ["<p>", "</p>", "<div class='sidebar'>", "</div>", "<table>", "<tr>", "<td>", "<li>", "<ul>", "</ul>", "<pre>",
     "<a href='x'>", "</a>", "<h1>", "</h1>", "<math>", "<msup>", "<script>", "</script>", "<br>", "<!--", "-->",
     "&#0;", "&#xD800;", "<sup>2</sup>", "<svg>", "<article>", "words and words, of some length. "]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_PIECES, st.text(max_size=8)), max_size=40))
def test_no_page_raises(pieces: list[str]) -> None:
    page = extract("".join(pieces))
    assert page.text == page.text.strip("\n") or "```" in page.text


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["", "utf-8", "latin-1", "no-such-charset", "utf-16"]))
def test_no_bytes_raise(content: bytes, charset: str) -> None:
    text, name = decode(content, charset)
    assert isinstance(text, str) and name


def test_every_word_of_a_plain_page_survives() -> None:
    paragraphs = [f"{WORDS}Number {i} of the paragraphs." for i in range(20)]
    text = extract("<html><body>" + "".join(f"<p>{p}</p>" for p in paragraphs) + "</body></html>").text
    assert text == "\n\n".join(paragraphs)


def _pages(folder: Path, name: str, number: int) -> list[dict]:
    import zstandard

    with open(folder / "webpages" / name, "rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        return [json.loads(line) for line, _ in zip(lines, range(number))]


def test_better_than_resiliparse_on_labelled_pages(shared_data: Path) -> None:
    from resiliparse.extract.html2text import extract_plain_text

    def f1(found: str, truth: str) -> float:
        a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (found, truth))
        return 2 * sum((a & b).values()) / max(1, sum(a.values()) + sum(b.values()))

    pages = _pages(shared_data, "scrapinghub-articles.jsonl.zst", 30)
    ours = [f1(extract(p["html"]).text, p["truth"]["articleBody"]) for p in pages]
    plain = [f1(extract_plain_text(p["html"], main_content=True), p["truth"]["articleBody"]) for p in pages]
    assert sum(ours) / len(ours) > 0.94
    assert sum(ours) > sum(plain)
