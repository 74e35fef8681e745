"""The Sphinx extension of the book, on books of a few lines; and what style sheet, script and ledger must agree on."""

import io
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from bdpo import ledger
from bdpo.ledger.claim import badge

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book/_ext"))
sphinx_application = pytest.importorskip("sphinx.application", reason="Sphinx is not installed: pip install '.[book]'")
docutils_namespace = pytest.importorskip("sphinx.util.docutils").docutils_namespace

CONFIG = {
    "extensions": ["myst_nb", "sphinx_proof", "bdpo_book"],
    "root_doc": "index",
    "nb_execution_mode": "off",
    "nitpicky": True,
    "numfig": True,
    "myst_enable_extensions": ["colon_fence", "dollarmath"],
    "exclude_patterns": ["_build"],
}


def row(claim, **changes):
    return {**ledger.empty_row(ledger.INDEX[claim]), **changes}


RULED = row("lem-1", verdict="holds", latex=r"a < b", notebook="chapter", mutants_total=4, mutants_killed=3)
WRONG = row("thm-4", verdict="refuted", latex=None, notebook="chapter", mutants_total=2, mutants_killed=2)
OPEN = row("eq-2")


class Book:
    """A book in a folder: write pages, notebooks and rows, build, look."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def pages(self, **pages):
        self.write("index.md", "# Index\n\n```{toctree}\n:numbered:\n" + "\n".join(pages) + "\n```\n")
        for name, text in pages.items():
            if text is not None:
                self.write(f"{name}.md", f"# Page {name}\n\n{text}\n")

    def notebook(self, cells, executed):
        for folder, content in {"notebooks": cells, "_build/notebooks": executed}.items():
            if content is not None:
                python = {"language_info": {"name": "python"}}
                self.write(f"{folder}/chapter.ipynb", nbformat.writes(new_notebook(cells=content, metadata=python)))

    def claims(self, *rows):
        for each in rows:
            self.write(f"_build/claims/{each['id']}.json", json.dumps(each))
        self.write("_build/claims.json", json.dumps({"claims": rows}))

    def build(self):
        """Build, and return the warnings."""
        warnings, out = io.StringIO(), self.folder / "_build/html"
        with docutils_namespace():
            sphinx_application.Sphinx(
                self.folder, None, out, self.folder / "_build/doctrees", "html", CONFIG, status=None, warning=warnings
            ).build()
        return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in warnings.getvalue().splitlines()]

    def html(self, page):
        return (self.folder / f"_build/html/{page}.html").read_text("utf-8")


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)


class Text(HTMLParser):
    """The words of a piece of HTML."""

    def __init__(self, html):
        super().__init__()
        self.words = ""
        self.feed(html)

    def handle_data(self, data):
        self.words += data


def words(html):
    return " ".join(Text(html).words.split())


def code(source, *outputs, **metadata):
    return new_code_cell(source, id=f"cell-{abs(hash(source))}", outputs=list(outputs), metadata=metadata)


def html_output(html):
    return new_output("display_data", data={"text/html": html, ledger.MIME: {"id": "lem-1"}})


TITLE = new_markdown_cell("# Chapter", id="title")

# Executed notebooks


def test_outputs_of_the_last_execution_are_shown(book):
    book.pages(**{"notebooks/chapter": None})
    book.notebook([TITLE, code("1 + 1")], [TITLE, code("1 + 1", html_output("<b>two</b>"))])
    assert book.build() == []
    assert "<b>two</b>" in book.html("notebooks/chapter")


@pytest.mark.parametrize(
    ("executed", "complaint"),
    [(None, "has not been executed; run: bdpo build"), ([TITLE, code("1 + 2")], "executed before its code changed")],
    ids=["never", "before a change"],
)
def test_a_notebook_without_fresh_outputs_is_complained_of(book, executed, complaint):
    book.pages(**{"notebooks/chapter": None})
    book.notebook([TITLE, code("1 + 1")], executed)
    (warning,) = book.build()
    assert warning.startswith(str(book.folder / "notebooks/chapter.ipynb"))
    assert complaint in warning


def test_other_parameters_are_told_and_do_not_count_as_changed_code(book):
    book.pages(**{"notebooks/chapter": None})
    given = code("n = 3", tags=["injected-parameters"])
    book.notebook([TITLE, code("n = 2"), code("n")], [TITLE, code("n = 2"), given, code("n", html_output("three"))])
    assert book.build() == []
    page = words(book.html("notebooks/chapter"))
    assert "Executed with parameters other than those below: n = 3" in page
    assert "three" in page


def test_prose_refers_to_figures_and_cards_in_outputs(book):
    book.pages(**{"notebooks/chapter": None, "other": "[the curve](#fig-a) and [its card](#claim-lem-1)"})
    shown = html_output('<figure class="bdpo-figure" id="fig-a"></figure><div class="claim" id="claim-lem-1"></div>')
    book.notebook([TITLE, code("show()")], [TITLE, code("show()", shown)])
    assert book.build() == []
    for target in ("fig-a", "claim-lem-1"):
        assert f'href="notebooks/chapter.html#{target}"' in book.html("other")


# Claims


def box(page):
    (found,) = re.findall(r'<div class="proof [^>]*>.*?</section>\s*</div>', page, re.S)
    return found


def test_claim_is_a_numbered_box(book):
    book.pages(one="words", two=":::{claim} lem-1\n:::")
    book.claims(RULED)
    assert book.build() == []
    found = box(book.html("two"))
    assert 'id="lem-1"' in found
    assert words(found).startswith("Lemma 2.1 (Lemma 1, Eq 9, §4.1) lem-1: holds The Jacobian of the softmax.")
    assert r"\[a &lt; b\]" in found


def test_formulas_inside_the_statement_are_mathematics(book):
    book.pages(one=":::{claim} thm-4\n:::")
    book.claims(WRONG)
    assert book.build() == []
    assert '<span class="math notranslate nohighlight">\\(\\beta_i\\)</span>' in box(book.html("one"))


def test_open_claim_says_so_and_has_the_general_name(book):
    book.pages(one=":::{claim} eq-2\n:::")
    book.claims(OPEN)
    book.build()
    assert words(box(book.html("one"))).startswith("Claim 1.1 (Eq 2, §3.1) eq-2: open")
    assert "Not ruled on yet" in box(book.html("one"))


def test_all_boxes_share_one_counter_and_are_referred_to_from_elsewhere(book):
    book.pages(
        zero="words",
        one=":::{claim} lem-1\n:::\n\n:::{claim} eq-2\n:::\n\n:::{claim} thm-4\n:::",
        two="{prf:ref}`lem-1`, {prf:ref}`eq-2`, {prf:ref}`thm-4`",
    )
    book.claims(RULED, OPEN, WRONG)
    book.build()
    assert "Lemma 2.1, Claim 2.2, Theorem 2.3" in words(book.html("two"))
    assert 'href="one.html#thm-4"' in book.html("two")


def test_two_boxes_of_one_claim_are_complained_of(book):
    book.pages(one=":::{claim} lem-1\n:::", two=":::{claim} lem-1\n:::")
    book.claims(RULED)
    (warning,) = book.build()
    assert "claim 'lem-1' already has a box, in one" in warning


@pytest.mark.parametrize("use", [":::{claim} eq-99\n:::", "{verdict}`eq-99`"], ids=["claim", "verdict"])
def test_unknown_claim_is_named_with_the_command_that_lists_them(book, use):
    book.pages(one=use)
    book.claims(RULED)
    (warning,) = book.build()
    assert "one.md:3" in warning
    assert "the ledger has no claim 'eq-99'; `bdpo claims` lists them" in warning


@pytest.mark.parametrize(
    "use",
    [":::{claim} eq-2\n:::", "{verdict}`eq-2`", ":::{verdicts-table}\n:::", ":::{verdict-summary}\n:::"],
    ids=["claim", "verdict", "table", "summary"],
)
def test_nothing_collected_names_the_command_that_does(book, use):
    book.pages(one=use)
    (warning,) = book.build()
    assert "nothing is collected yet; run: bdpo build" in warning


def test_badge_leads_to_the_card(book):
    book.pages(**{"notebooks/chapter": None, "one": "Lemma {verdict}`lem-1`."})
    book.notebook([TITLE], [TITLE])
    book.claims(RULED)
    assert book.build() == []
    (link,) = re.findall(r'<a [^>]*href="notebooks/chapter.html#claim-lem-1".*?</a>', book.html("one"))
    assert badge("holds") in link
    assert words(link) == "lem-1: holds"


def test_badge_of_an_open_claim_leads_to_its_row(book):
    book.pages(**{"book/verdicts": ":::{verdicts-table}\n:::", "one": "{verdict}`eq-2`"})
    book.claims(OPEN)
    assert book.build() == []
    assert 'href="book/verdicts.html#eq-2"' in book.html("one")


def test_pages_follow_the_ledger(book):
    book.pages(one="{verdict}`lem-1`", two="words")
    book.claims(RULED)
    book.build()
    before = (book.folder / "_build/html/two.html").stat().st_mtime_ns
    time.sleep(0.01)
    book.claims({**RULED, "verdict": "refuted"})
    book.build()
    assert badge("refuted") in book.html("one")
    assert (book.folder / "_build/html/two.html").stat().st_mtime_ns == before


def test_table_has_a_row_a_claim_with_place_and_evidence(book):
    book.pages(
        **{"notebooks/chapter": None, "book/verdicts": ":::{verdicts-table}\n:::", "one": ":::{claim} lem-1\n:::"}
    )
    book.notebook([TITLE], [TITLE])
    book.claims(RULED, WRONG, OPEN)
    assert book.build() == []
    page = book.html("book/verdicts")
    rows = dict(re.findall(r'<tr class="verdict-[^>]* id="([^"]*)">(.*?)</tr>', page, re.S))
    assert list(rows) == ["lem-1", "thm-4", "eq-2"]
    cells = [words(cell) for cell in rows["lem-1"].split("</td>")]
    assert cells == [
        "lem-1", "Lemma 1, Eq 9, §4.1", r"The Jacobian of the softmax. \(a < b\)", "lem-1: holds", "3/4", "",
    ]  # fmt: skip
    assert 'href="../one.html#lem-1"' in rows["lem-1"]  # its box
    assert 'href="../notebooks/chapter.html#claim-lem-1"' in rows["lem-1"]  # its card
    assert rows["thm-4"].count('href="../notebooks/chapter.html#claim-thm-4"') == 2  # no box: both lead to the card
    assert words(rows["eq-2"]).endswith("eq-2: open –")
    assert "2 of 3 statements are ruled on" in page
    assert 'href="../claims.json"' in page


def test_summary_counts_each_verdict_that_occurs(book):
    book.pages(**{"book/verdicts": ":::{verdicts-table}\n:::", "one": ":::{verdict-summary}\n:::"})
    book.claims(OPEN, row("eq-3"), RULED)
    assert book.build() == []
    assert "3 statements: holds 1 open 2" in words(book.html("one"))
    assert 'href="book/verdicts.html?verdict=open"' in book.html("one")


# The site


def test_mathjax_and_ledger_lie_in_the_site(book):
    book.pages(one="words")
    book.claims(OPEN)
    book.build()
    html = book.folder / "_build/html"
    assert json.loads((html / "claims.json").read_text()) == {"claims": [OPEN]}
    assert (html / "_static/mathjax/tex-chtml-full.js").is_file()
    assert list((html / "_static/mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))
    assert "mathjax" in book.html("one").lower()  # also on a page whose own text has no formula


def test_proofs_of_a_page_do_not_share_an_id(book):
    proof = ":::{prf:proof}\nClear.\n:::\n\n"
    book.pages(one=proof + proof + ":::{prf:theorem}\nA.\n:::\n\n:::{prf:theorem}\nB.\n:::\n")
    assert book.build() == []
    ids = re.findall(r'\bid="([^"]*)"', book.html("one"))
    assert len(ids) == len(set(ids))


def test_no_line_begins_with_the_comma_after_a_formula(book):
    book.pages(one="For $a$, $b$ and $c$ (or $d$).")
    assert book.build() == []
    (text,) = re.findall(r"<p>(For .*)</p>", book.html("one"))
    assert re.findall(r'<span class="tied"><span [^>]*>\\\((.)\\\)</span>([^<]+)</span>', text) == [
        ("a", ","),
        ("d", ")."),
    ]
    assert words(text) == r"For \(a\), \(b\) and \(c\) (or \(d\))."


# What must agree


@pytest.fixture(scope="module")
def style():
    return (ROOT / "book/_static/custom.css").read_text("utf-8")


def test_legend_explains_every_verdict_in_the_words_of_the_badges():
    legend = (ROOT / "book/index.md").read_text("utf-8")
    shown = [
        f'<span class="badge {name}">{text}</span>'
        for text, name in re.findall(r"\[([^]]+)\]\{\.badge \.([\w-]+)\}", legend)
    ]
    assert shown == [badge(verdict) for verdict in ledger.VERDICTS]


def test_script_knows_every_verdict_in_order():
    script = (ROOT / "book/_static/book.js").read_text("utf-8")
    (order,) = re.findall(r"const order = \[(.*?)\]", script, re.S)
    assert tuple(re.findall(r'"([\w-]+)"', order)) == ledger.VERDICTS


def colours(style, scheme):
    """The custom properties of a scheme; dark overrides light."""
    light, dark = (
        re.search(rf"{start} \{{(.*?)\}}", style, re.S)[1] for start in (r"html", r'html\[data-theme="dark"\]')
    )
    found = dict(re.findall(r"(--[\w-]+): (#\w{6});", light))
    return {**found, **dict(re.findall(r"(--[\w-]+): (#\w{6});", dark))} if scheme == "dark" else found


def luminance(colour):
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("verdict", [v for v in ledger.VERDICTS if v not in ("not-run", "open")])
def test_badge_is_legible(style, verdict, scheme):
    (rule,) = re.findall(rf"\.badge-{verdict}[,\s][^{{}}]*\{{\s*--ink: var\((.*?)\);\s*--fill: var\((.*?)\);", style)
    ink, fill = sorted((luminance(colours(style, scheme)[name]) for name in rule), reverse=True)
    assert (ink + 0.05) / (fill + 0.05) >= 4.5
