"""Two views of the whole ledger: the errata, sorted by consequence, and the graph of what rests on what."""

from __future__ import annotations

import html
from typing import Any

from bdpo_book import LedgerDirective, badge, link_to
from docutils import nodes
from sphinx.application import Sphinx

from bdpo.ledger import graph
from bdpo.ledger.claim import findings

HIDDEN = {"equation"}  # in the graph, unless something that is shown rests on it
WIDTH, HEIGHT, GAP_X, GAP_Y = 196, 30, 48, 10  # of a node of the graph, and between nodes, in pixels


def raw(content: str) -> nodes.raw:
    return nodes.raw("", content, format="html")


class Errata(LedgerDirective):
    """``:::{errata} refuted``: all rows of one verdict, those on which most of the paper rests first."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        rows = self.rows()
        above = graph.consequences(rows)
        own = [r for r in rows if r["verdict"] == self.arguments[0] and r["anchor"] == f"claim-{r['id']}"]
        own.sort(key=lambda r: -len(above[r["id"]]))
        return [self.erratum(r, above[r["id"]]) for r in own] or [nodes.paragraph("", "None.")]

    def erratum(self, row: dict[str, Any], above: set[str]) -> nodes.container:
        docname = self.env.docname
        head = nodes.paragraph(
            "", "", link_to("place", row, docname, nodes.literal("", row["id"])), classes=["claim-head"]
        )
        head += nodes.inline("", f" {row['locator']} ", classes=["claim-locator"])
        head += badge(row, docname)
        words, _ = self.parse_inline(row["statement"], lineno=self.lineno)
        failed = sum(e["passed"] is False for e in row["evidence"])
        passed = sum(e["passed"] is True for e in row["evidence"])
        resting = f"On it rest, in the end: {', '.join(sorted(above))}." if above else "Nothing else rests on it."
        checks = nodes.paragraph("", f"Checks that fail: {failed}; that pass: {passed}. {resting}")
        checks["classes"].append("erratum-checks")
        statement = nodes.paragraph("", "", *words)
        return nodes.container("", head, statement, raw(findings(row)), checks, classes=["claim", "erratum"])


class DependencyGraph(LedgerDirective):
    """``{dependency-graph}``: statements as boxes coloured by verdict, a stripe for the weakest that they rest on."""

    def run(self) -> list[nodes.Node]:
        rows = self.rows()
        if not rows:
            return []
        by_id = {r["id"]: r for r in rows}
        needed = set().union(*(set(r["rests_on"]) for r in rows if r["kind"] not in HIDDEN))
        shown = {r["id"] for r in rows if r["kind"] not in HIDDEN} | needed
        columns = graph.layers(rows, shown)
        edges = [(below, r["id"]) for r in rows if r["id"] in shown for below in r["rests_on"] if below in shown]
        self.order(columns, edges)
        place = {
            name: (20 + x * (WIDTH + GAP_X), 20 + y * (HEIGHT + GAP_Y))
            for x, column in enumerate(columns)
            for y, name in enumerate(column)
        }
        lines = [self.edge(place[a], place[b]) for a, b in edges]
        weakest = graph.weakest(rows)
        boxes = [self.box(by_id[name], weakest[name], *place[name]) for name in place]
        width = 40 + len(columns) * (WIDTH + GAP_X) - GAP_X
        height = 40 + max(map(len, columns)) * (HEIGHT + GAP_Y)
        label = f"{len(shown)} statements of the paper and {len(edges)} links from a statement to what it rests on"
        svg = (
            f'<div class="dependency-graph" tabindex="0" role="group" aria-label="{label}; scrolls sideways">'
            f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f"{''.join(lines)}{''.join(boxes)}</svg></div>"
        )
        return [raw(svg)]

    @staticmethod
    def order(columns: list[list[str]], edges: list[tuple[str, str]]) -> None:
        """Put each statement near the mean height of its neighbours in the columns before and after."""
        for _ in range(6):
            height = {name: y for column in columns for y, name in enumerate(column)}
            for column in columns:
                near = {
                    n: [height[a] for a, b in edges if b == n] + [height[b] for a, b in edges if a == n] for n in column
                }
                column.sort(key=lambda n: sum(near[n]) / len(near[n]) if near[n] else height[n])
                height.update({name: y for y, name in enumerate(column)})

    @staticmethod
    def edge(start: tuple[int, int], end: tuple[int, int]) -> str:
        x, y, u, v = start[0] + WIDTH, start[1] + HEIGHT / 2, end[0], end[1] + HEIGHT / 2
        bend = max((u - x) / 2, 24)
        return f'<path class="edge" d="M{x},{y}C{x + bend},{y} {u - bend},{v} {u},{v}"/>'

    def box(self, row: dict[str, Any], weakest: str, x: int, y: int) -> str:
        home = f"notebooks/{row['notebook']}" if row["notebook"] else "book/verdicts"
        target = self.env.app.builder.get_relative_uri(self.env.docname, home)
        anchor = row["anchor"] if row["notebook"] else row["id"]
        title = f"{row['id']}: {row['verdict']}; weakest below: {weakest}"
        return (
            f'<a href="{target}#{anchor}" class="badge-{row["verdict"]}"><title>{html.escape(title)}</title>'
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
            f'<rect class="below badge-{weakest}" x="{x}" y="{y + 4}" width="6" height="{HEIGHT - 8}" rx="3"/>'
            f'<text x="{x + 14}" y="{y + HEIGHT / 2 + 4}">{row["id"]}</text></a>'
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("errata", Errata)
    app.add_directive("dependency-graph", DependencyGraph)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
