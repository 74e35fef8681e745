"""What this book asks of Sphinx beyond the usual extensions.

- Notebooks are shown with the outputs of their last execution (``_build/notebooks``).
- ``{claim}`` shows a statement of the paper as a numbered box, ``{verdict}`` its verdict as a badge,
  ``{verdicts-table}`` all of them, ``{verdict-summary}`` how many there are of each; what they show is read from the
  collected ledger (``_build/claims``), never typed.
- MathJax and ``claims.json`` are copied into the site, which therefore works offline.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.nodes import make_refnode
from sphinx_proof.nodes import NODE_TYPES

from bdpo.ledger import MIME, VERDICTS
from bdpo.ledger.claim import badge as badge_html
from bdpo.ledger.claim import readings, several_formulas

logger = logging.getLogger(__name__)

BUILD = "bdpo build"
TABLE = "book/verdicts"  # the page that has a row for every claim
BOXES = {"theorem", "lemma", "corollary", "proposition", "definition", "assumption"}  # any other kind is a "claim"


def warn(message: str, *args: object, location: Any) -> None:
    logger.warning(message, *args, location=location, type="bdpo")


# Executed notebooks


def show_outputs(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the outputs of the last execution into the notebook that Sphinx is about to read."""
    if not docname.startswith("notebooks/"):
        return
    path = Path(app.srcdir, "_build", f"{docname}.ipynb")
    app.env.note_dependency(str(path))
    if not path.exists():
        return warn("%s has not been executed; run: %s", docname, BUILD, location=docname)
    notebook, executed = nbformat.reads(source[0], as_version=4), nbformat.read(path, as_version=4)
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    runs = [cell for cell in executed.cells if cell.cell_type == "code" and cell not in injected]
    if [cell.source for cell in cells] != [run.source for run in runs]:
        return warn("%s was executed before its code changed; run: %s", docname, BUILD, location=docname)
    for cell, run in zip(cells, runs, strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
        for output in run.outputs:
            output.get("data", {}).pop(MIME, None)  # MyST-NB warns of what it cannot show
    for cell in injected:
        note = f":::{{note}}\nExecuted with parameters other than those below:\n```python\n{cell.source}\n```\n:::"
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(note, id="other-parameters"))
    source[0] = nbformat.writes(notebook)


def name_outputs(app: Sphinx, doctree: nodes.document) -> None:
    """Let prose refer to the figures and claim cards in notebook outputs, as in ``[the curve](#fig-curve)``."""
    labels = app.env.get_domain("std").data["anonlabels"]
    for output in doctree.findall(nodes.raw):
        if output.get("format") == "html":
            for name in re.findall(r'<(?:figure|div)\b[^>]*?\sid="([^"]+)"', output.astext()):
                labels[name] = app.env.docname, name


# Claims


def claims_folder(env: BuildEnvironment) -> Path:
    return Path(env.srcdir, "_build", "claims")


def read_row(env: BuildEnvironment, claim: str, location: Any) -> dict[str, Any] | None:
    """The ledger's row of a claim; None, after a warning, where there is none."""
    path = claims_folder(env) / f"{claim}.json"
    env.note_dependency(str(path))
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    if path.parent.exists():
        warn("the ledger has no claim %r; `bdpo claims` lists them", claim, location=location)
    else:
        warn("claim %r cannot be shown, nothing is collected yet; run: %s", claim, BUILD, location=location)
    return None


def formulas(row: dict[str, Any]) -> list[str]:
    latex = row["latex"] or []
    return [latex] if isinstance(latex, str) else latex


def link_to(what: str, row: dict[str, Any], docname: str, *content: nodes.Node) -> pending_xref:
    """A link to a claim's ``evidence`` (its card in a notebook) or ``place`` (its box), resolved at the end."""
    home = f"notebooks/{Path(row['notebook']).stem}" if row["notebook"] else None
    return pending_xref(
        "",
        nodes.inline("", "", *content),
        reftype=f"claim-{what}", refdomain="", refexplicit=True, refwarn=True, refdoc=docname,
        reftarget=row["id"], home=home, anchor=row["anchor"],
    )  # fmt: skip


def resolve_link(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> nodes.reference | None:
    """Point a link of `link_to` at the best place there is; the verdicts page has a row for every claim."""
    claim, kind = node["reftarget"], node["reftype"]
    boxes = getattr(env, "proof_list", {})
    if kind == "claim-place" and claim in boxes:
        return make_refnode(app.builder, node["refdoc"], boxes[claim]["docname"], claim, content)
    if kind in ("claim-place", "claim-evidence"):
        home = (node["home"], node["anchor"]) if node["home"] in env.found_docs else (TABLE, claim)
        return make_refnode(app.builder, node["refdoc"], *home, content)
    return None


def rename_repeated_ids(app: Sphinx, doctree: nodes.document) -> None:
    """Proofs, and the bodies of theorems and exercises, have the same id each on a page; number them."""
    repeated = (["proof"], ["proof-content"], ["exercise-content"], ["solution-content"])
    for place, node in enumerate(doctree.findall(nodes.Element)):
        if node["ids"] in repeated:
            node["ids"] = [f"{node['ids'][0]}-{place}"]


def badge(row: dict[str, Any], docname: str) -> pending_xref:
    whose = nodes.inline("", f"{row['id']}: ", classes=["visually-hidden"])
    return link_to("evidence", row, docname, whose, nodes.raw("", badge_html(row["verdict"]), format="html"))


class VerdictRole(SphinxRole):
    """``{verdict}`eq-2` ``: the verdict as a badge that leads to the evidence."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        row = read_row(self.env, self.text.strip(), self.get_location())
        return ([badge(row, self.env.docname)] if row else []), []


class ClaimDirective(SphinxDirective):
    """``:::{claim} thm-1-dpo``: the statement as a numbered box, to which ``{prf:ref}`thm-1-dpo` `` refers."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        row = read_row(self.env, self.arguments[0], self.get_location())
        if row is None:
            return []
        claim, kind = row["id"], row["kind"] if row["kind"] in BOXES else "claim"
        if not hasattr(self.env, "proof_list"):
            self.env.proof_list = {}
        if claim in self.env.proof_list:
            other = self.env.proof_list[claim]["docname"]
            warn("claim %r already has a box, in %s", claim, other, location=self.get_location())
        entry = {"countertype": "theorem", "realtype": kind, "label": claim}
        self.env.proof_list[claim] = {
            **entry, "docname": self.env.docname, "ids": [claim], "prio": 0, "nonumber": False
        }  # fmt: skip

        where = f"({row['locator']})"
        title = nodes.title(where, where, nodes.Text(" "), badge(row, self.env.docname))
        body = nodes.section(classes=[f"{kind}-content"], ids=[f"{claim}-statement"])
        body.document = self.state.document
        self.state.nested_parse(StringList(row["statement"].splitlines(), self.arguments[0]), self.content_offset, body)
        if several_formulas(row):
            body += nodes.raw("", readings(row), format="html")
        else:
            for latex in formulas(row):
                body += nodes.math_block(latex, latex, nowrap=False, number=None, label=None, docname=self.env.docname)
        if row["verdict"] == "open":
            body += nodes.paragraph("", "Not ruled on yet: no chapter checks this statement.", classes=["claim-open"])
        box = NODE_TYPES["theorem"]("", title, body, ids=[claim], classes=["proof", kind], title=where, **entry)
        self.set_source_info(box)
        return [box]


class LedgerDirective(SphinxDirective):
    """A directive that shows all rows."""

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the ledger; none, after a warning, if nothing is collected."""
        path = claims_folder(self.env).with_suffix(".json")
        self.env.note_dependency(str(path))
        if path.exists():
            return json.loads(path.read_text("utf-8"))["claims"]
        warn("no verdicts to show, nothing is collected yet; run: %s", BUILD, location=self.get_location())
        return []


class VerdictSummary(LedgerDirective):
    """``{verdict-summary}``: how many statements there are of each verdict, each count a link to those rows."""

    def run(self) -> list[nodes.Node]:
        rows = self.rows()
        if not rows:
            return []
        found = Counter(row["verdict"] for row in rows)
        line = nodes.paragraph("", f"{len(rows)} statements: ", classes=["verdict-summary"])
        table = self.env.app.builder.get_relative_uri(self.env.docname, TABLE)
        for verdict in filter(found.get, VERDICTS):
            mark = nodes.raw("", badge_html(verdict), format="html")
            line += nodes.reference("", "", mark, nodes.Text(f" {found[verdict]}"), refuri=f"{table}?verdict={verdict}")
            line += nodes.Text(" ")
        return [line]


class VerdictsTable(LedgerDirective):
    """``{verdicts-table}``: one row a claim; ``book.js`` adds sorting and filters to what is a plain table."""

    columns = (("Claim", 12), ("Where", 14), ("Statement", 50), ("Verdict", 14), ("Mutants killed", 10))

    def run(self) -> list[nodes.Node]:
        rows = self.rows()
        if not rows:
            return []
        group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for _, width in self.columns), cols=len(self.columns))
        header = nodes.row("", *(nodes.entry("", nodes.paragraph("", name)) for name, _ in self.columns))
        group += nodes.thead("", header)
        group += nodes.tbody("", *map(self.line, rows))
        ruled = sum(row["verdict"] != "open" for row in rows)
        data = nodes.reference("", "claims.json", refuri="../" * self.env.docname.count("/") + "claims.json")
        summary = nodes.paragraph(
            "", f"{ruled} of {len(rows)} statements are ruled on. All of it as data: ", data, nodes.Text(".")
        )
        return [summary, nodes.table("", group, classes=["verdicts"], ids=["verdicts-table"])]

    def line(self, row: dict[str, Any]) -> nodes.row:
        docname = self.env.docname
        statement, _ = self.parse_inline(row["statement"], lineno=self.lineno)
        killed = f"{row['mutants_killed']}/{row['mutants_total']}" if row["mutants_total"] else "–"
        cells = (
            [link_to("place", row, docname, nodes.literal("", row["id"]))],
            [nodes.Text(row["locator"])],
            statement,
            [badge(row, docname)],
            [nodes.Text(killed)],
        )
        entries = [nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells]
        for latex in formulas(row):
            entries[2] += nodes.paragraph("", "", nodes.math(latex, latex))
        if not row["mutants_total"]:
            entries[-1]["classes"].append("no-mutants")
        return nodes.row("", *entries, ids=[row["id"]], classes=[f"verdict-{row['verdict']}"])


# The site


def plain_bibliography(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Docutils marks references up as a list of a kind that screen readers reject."""
    if 'role="doc-biblioentry"' in context.get("body", ""):
        context["body"] = context["body"].replace(' role="list"', "").replace(' role="doc-biblioentry"', "")


def keep_punctuation(app: Sphinx, doctree: nodes.document) -> None:
    """Tie punctuation to the formula before it, else browsers may begin a line with a comma."""
    for formula in list(doctree.findall(nodes.math)):
        parent, place = formula.parent, formula.parent.index(formula)
        after = parent[place + 1] if place + 1 < len(parent) else None
        if isinstance(after, nodes.Text) and (found := re.match(r"[,.;:!?)\]’”]+", after)):
            tied = nodes.inline("", "", formula.deepcopy(), nodes.Text(found[0]), classes=["tied"])
            parent[place : place + 2] = [tied, nodes.Text(after[found.end() :])]


def drop_sourceless(app: Sphinx) -> list[Any]:
    """The list of sources would link to modules that have none, such as ``builtins``."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, source in modules.items() if not source]:
        del modules[name]
    return []


def copy_files(app: Sphinx, failure: Exception | None) -> None:
    """Copy MathJax and the ledger into the site."""
    if failure or app.builder.format != "html":
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the book needs MathJax: pip install sphinx-mathjax-offline")
    source, target = Path(spec.origin).parent / "static/mathjax", Path(app.outdir, "_static/mathjax")
    for part in ("tex-chtml-full.js", "output/chtml/fonts", "a11y", "sre"):
        copy = shutil.copytree if (source / part).is_dir() else shutil.copy2
        if not (target / part).exists():
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            copy(source / part, target / part)
    ledger = Path(app.srcdir, "_build", "claims.json")
    if ledger.exists():
        shutil.copy2(ledger, Path(app.outdir, "claims.json"))


def setup(app: Sphinx) -> dict[str, Any]:
    app.set_html_assets_policy("always")  # cards in notebook outputs hold mathematics that Sphinx does not see
    app.add_role("verdict", VerdictRole())
    app.add_directive("claim", ClaimDirective)
    app.add_directive("verdict-summary", VerdictSummary)
    app.add_directive("verdicts-table", VerdictsTable)
    app.connect("source-read", show_outputs)
    app.connect("doctree-read", name_outputs)
    app.connect("doctree-read", rename_repeated_ids)
    app.connect("doctree-read", keep_punctuation)
    app.connect("missing-reference", resolve_link)
    app.connect("html-page-context", plain_bibliography)
    app.connect("html-collect-pages", drop_sourceless, priority=400)  # before viewcode makes the list
    app.connect("build-finished", copy_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
