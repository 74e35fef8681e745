"""The ledger: complete, computed, and moved by a change of formula or of evidence."""

import itertools
import re
from pathlib import Path

import pytest
import sympy as sp

from bdpo import ledger
from bdpo import verify as v
from bdpo.ledger import graph
from bdpo.ledger.index import INDEX
from bdpo.ledger.rules import reading_verdict, verdict

x, y = sp.symbols("x y", positive=True)
SHARED_INDEX = Path(__file__).parents[2] / "shared" / "design" / "claims-index.md"


def evidence(passed, strength="proof", role="printed", reading="as printed", killed=3, total=3):
    return {
        "passed": passed,
        "strength": strength,
        "role": role,
        "reading": reading,
        "mutants_killed": killed,
        "mutants_total": total,
        "counterexample": {"x": "1"} if passed is False else None,
    }


# ---------------------------------------------------------------- the index


def test_index_has_every_equation_once_and_points_only_to_known_ids():
    assert {f"eq-{k}" for k in range(1, 87)} <= set(INDEX)
    for entry in INDEX.values():
        assert set(entry.rests_on) <= set(INDEX), entry.id
        assert entry.same_as is None or INDEX[entry.same_as].same_as is None, entry.id
        assert entry.id not in entry.rests_on


def test_index_equals_the_list_of_ids_that_the_book_has_to_rule_on():
    if not SHARED_INDEX.exists():
        pytest.skip("the list of ids is not part of a checkout; the other tests of the index still run")
    listed = {f"eq-{k}" for k in range(1, 87)}
    for line in SHARED_INDEX.read_text().splitlines():
        if line.startswith("| `"):
            names = re.findall(r"`([^`]+)`", line.split("|")[1])
            if "…" in line.split("|")[1]:
                first, last = names
                names = [first[:-1] + chr(c) for c in range(ord(first[-1]), ord(last[-1]) + 1)]
            listed.update(names)
    assert set(INDEX) == listed


def test_what_rests_on_what_has_no_cycle():
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, f"{name} rests on itself through {above}"
        if name not in done:
            for below in INDEX[name].rests_on:
                visit(below, (*above, name))
            done.add(name)

    for name in INDEX:
        visit(name, ())
    assert done == set(INDEX)


# ---------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], "open"),
        ([evidence(True)], "holds"),
        ([evidence(True, "exhaustive")], "holds"),
        ([evidence(True, "search")], "open"),
        ([evidence(None)], "open"),
        ([evidence(True, "search"), evidence(True, role="step")], "holds"),
        ([evidence(True, "search"), evidence(True, role="step"), evidence(True, "search", role="step")], "open"),
        ([evidence(True, role="step")], "open"),
        ([evidence(False), evidence(True, role="step")], "refuted"),
        ([evidence(False)], "refuted"),
        ([evidence(False), evidence(True, role="corrected")], "holds-corrected"),
        ([evidence(False), evidence(True, role="under")], "holds-with-condition"),
        ([evidence(False), evidence(True, "search", role="corrected")], "refuted"),
        ([evidence(False), evidence(True, role="corrected"), evidence(False, role="conclusion")], "refuted"),
        ([evidence(True), evidence(False)], "refuted"),
        ([evidence(True, killed=2)], "open"),
        ([evidence(False, killed=0)], "open"),
        ([evidence(True, killed=0, total=0)], "open"),
        ([evidence(True, "measurement", role="reproduction")], "reproduced"),
        ([evidence(None, "measurement", role="reproduction")], "open"),
    ],
)
def test_verdict_of_one_reading(items, expected):
    assert reading_verdict(items) == expected


def test_sharp_evidence_never_rescues():
    assert verdict([evidence(False), evidence(True, role="sharp")])[0] == "refuted"


def test_a_failed_well_posedness_makes_a_statement_ill_defined():
    assert verdict([evidence(True), evidence(False, role="well-posed")])[0] == "ill-defined"


def test_readings_that_disagree_become_the_condition():
    items = [evidence(True, reading="a"), evidence(False, reading="b")]
    assert verdict(items) == ("holds-with-condition", {"a": "holds", "b": "refuted"})


def test_one_open_reading_leaves_the_statement_open():
    assert verdict([evidence(True, reading="a"), evidence(True, "search", reading="b")])[0] == "open"


def test_measurements_that_disagree_are_a_partial_reproduction():
    runs = [evidence(p, "measurement", "reproduction", str(p)) for p in (True, False)]
    assert verdict(runs)[0] == "partly-reproduced"


def not_run(reading="as in the paper"):
    return evidence(None, "measurement", "not-run", reading, killed=0, total=0)


def test_what_was_not_run_is_neither_reproduced_nor_refuted():
    measured = {p: evidence(p, "measurement", "reproduction", "elsewhere") for p in (True, False, None)}
    assert verdict([not_run()]) == ("not-run", {"as in the paper": "not-run"})
    assert verdict([not_run(), measured[True]])[0] == "partly-reproduced"
    assert verdict([not_run(), measured[False]])[0] == "not-run"
    assert verdict([not_run(), measured[None]])[0] == "open"


def test_a_measurement_in_the_reading_that_was_not_run_decides_it():
    assert reading_verdict([not_run(), evidence(False, "measurement", "reproduction")]) == "not-reproduced"
    assert reading_verdict([not_run(), evidence(True, "search")]) == "open"


def test_a_claim_says_what_was_not_run():
    row = ledger.claim("tab-2").not_run("a 7B model", "as in the paper").row()
    assert row["verdict"] == "not-run"
    assert row["readings"] == [{"name": "as in the paper", "verdict": "not-run", "latex": None}]
    assert row["trust"] is None
    assert "a 7B model" in ledger.card(row)


def test_every_combination_of_two_pieces_of_evidence_has_a_known_verdict():
    pieces = [
        evidence(p, s, r, q)
        for p in (True, False, None)
        for s in ("proof", "exhaustive", "search", "measurement")
        for r in ledger.ROLES
        for q in ("a", "b")
    ]
    for pair in itertools.product(pieces, repeat=2):
        assert verdict(pair)[0] in ledger.VERDICTS


# ---------------------------------------------------------------- claims


def rule(formula):
    claim = ledger.claim("eq-2", formula=formula)
    return claim.printed(v.identity(claim.formula, mutants={"tripled": sp.Eq(formula.lhs, 3 * formula.rhs)}))


def test_changing_the_formula_changes_the_verdict():
    square = v.named("s", (x + y) ** 2)
    assert rule(sp.Eq(square, x**2 + 2 * x * y + y**2)).verdict == "holds"
    assert rule(sp.Eq(square, x**2 + x * y + y**2)).verdict == "refuted"


def test_evidence_about_another_formula_is_refused():
    claim = ledger.claim("eq-2", formula=sp.Eq(v.named("s", x + x), 2 * x))
    other = v.identity(sp.Eq((x + 1) ** 2, x**2 + 2 * x + 1))
    with pytest.raises(ValueError, match="displays"):
        claim.printed(other)


def test_evidence_must_be_evidence():
    with pytest.raises(TypeError, match="Evidence"):
        ledger.claim("txt-losers").printed(True)


def test_unknown_id_is_refused():
    with pytest.raises(KeyError, match="claims index"):
        ledger.claim("eq-87")


def test_readings_that_print_alike_are_shown_once():
    one, two = v.named("w", x), v.named("w", x + y)
    claim = ledger.claim("eq-2", formula={"a": sp.Eq(one, y), "b": sp.Eq(two, y), "c": sp.Eq(x, y)})
    assert claim.row()["latex"] == v.latex([claim.formula["a"], claim.formula["c"]])


def test_unknown_reading_is_refused():
    claim = ledger.claim("eq-2", formula={"a": sp.Eq(v.named("s", x + x), 2 * x)})
    with pytest.raises(ValueError, match="reading"):
        claim.printed(v.identity(claim.formula["a"]), reading="b")


def test_the_card_carries_text_colour_class_and_row():
    claim = rule(sp.Eq(v.named("s", (x + y) ** 2), x**2 + x * y + y**2))
    bundle = claim._repr_mimebundle_()
    assert bundle[ledger.MIME]["verdict"] == "refuted"
    assert 'class="badge badge-refuted">refuted<' in bundle["text/html"]
    assert 'id="claim-eq-2"' in bundle["text/html"]
    assert bundle[ledger.MIME]["counterexample"]


# ---------------------------------------------------------------- collecting


def test_collect_has_every_id_exactly_once_in_order():
    row = {**rule(sp.Eq(v.named("s", (x + y) ** 2), x**2 + 2 * x * y + y**2)).row(), "notebook": "a"}
    rows = ledger.collect([row])
    assert [r["id"] for r in rows] == list(INDEX)
    assert {r["verdict"] for r in rows} == {"holds", "open"}
    assert all(set(r) == set(row) for r in rows)


def test_collect_computes_verdicts_and_ignores_typed_ones():
    row = {**rule(sp.Eq(v.named("s", (x + y) ** 2), x**2 + x * y + y**2)).row(), "notebook": "a", "verdict": "holds"}
    assert next(r for r in ledger.collect([row]) if r["id"] == "eq-2")["verdict"] == "refuted"


def test_collect_shares_evidence_with_rows_that_are_the_same():
    claim = ledger.claim("lem-1", formula=sp.Eq(v.named("s", (x + y) ** 2), x**2 + 2 * x * y + y**2))
    row = {**claim.printed(v.identity(claim.formula)).row(), "notebook": "a"}
    found = {r["id"]: r for r in ledger.collect([row])}
    assert found["eq-9"]["verdict"] == "holds"
    assert found["eq-9"]["anchor"] == "claim-lem-1"
    assert found["eq-9"]["statement"] == INDEX["eq-9"].statement


def test_collect_refuses_two_rulings_and_unknown_ids():
    row = {**ledger.empty_row(INDEX["eq-2"]), "notebook": "a"}
    with pytest.raises(ValueError, match="twice"):
        ledger.collect([row, {**row, "notebook": "b"}])
    with pytest.raises(ValueError, match="not an id"):
        ledger.collect([{**row, "id": "eq-99"}])


# ---------------------------------------------------------------- what rests on what


def row(name, rests_on=(), same_as=None, verdict="holds"):
    return {"id": name, "rests_on": list(rests_on), "same_as": same_as, "verdict": verdict}


CHAIN = [row("a", verdict="refuted"), row("b", ["a"]), row("c", ["b"]), row("d"), row("e", same_as="c")]


def test_foundations_and_consequences_are_transitive_and_opposite():
    below, above = graph.foundations(CHAIN), graph.consequences(CHAIN)
    assert below["e"] == {"a", "b", "c"}
    assert above["a"] == {"b", "c", "e"}
    assert all(x in above[y] for x, needs in below.items() for y in needs)


def test_the_weakest_link_is_found_far_down():
    assert graph.weakest(CHAIN) == {"a": "refuted", "b": "refuted", "c": "refuted", "d": "holds", "e": "refuted"}


def test_a_circle_is_refused():
    with pytest.raises(ValueError, match="rests on itself"):
        graph.foundations([row("a", ["b"]), row("b", ["a"])])


def test_layers_put_foundations_first_also_through_hidden_statements():
    assert graph.layers(CHAIN, {"a", "c", "d"}) == [["a", "d"], ["c"]]


def test_every_verdict_has_a_place_in_the_order_of_weakness():
    assert set(graph.WEAKER) == set(ledger.VERDICTS)
