"""The plan and the report of the command line: settings, where they come from, and what is refused."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bdpo.llm import plan, report

GIVEN = {"model": "m", "data": "language", "out": "o"}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("command", plan.COMMANDS)
def test_every_setting_of_a_command_has_a_source_and_a_legal_default(command: str) -> None:
    given = {name: value for name, value in {**GIVEN, "runs": ["a"]}.items() if name in plan.of_command(command)}
    resolved = plan.resolve(command, given)
    assert set(resolved.settings) == set(plan.of_command(command))
    for name, source in resolved.sources.items():
        assert source == "command line" or source.startswith(("our choice: ", plan.PAPER)), name


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('beta = 0.2\nepochs = 3\nlearning_rate = 1e-5\n[sources]\nbeta = "our choice: a guess"\n')
    resolved = plan.resolve("train", {**GIVEN, "epochs": 1.0}, str(file))
    assert (resolved["beta"], resolved["epochs"], resolved["learning_rate"], resolved["seed"]) == (0.2, 1.0, 1e-5, 0)
    assert resolved.sources["beta"] == "our choice: a guess"
    assert resolved.sources["epochs"] == "command line"
    assert resolved.sources["learning_rate"] == f"file {file}"
    assert resolved.sources["seed"].startswith("our choice")


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", '{"beta": 0.5}'), ("a.yaml", "beta: 0.5\n"), ("a.toml", "beta = 0.5\n")]
)
def test_a_file_may_be_toml_yaml_or_json(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert plan.resolve("train", GIVEN, str(tmp_path / name))["beta"] == 0.5


def test_settings_of_the_loss_from_file_and_flags_are_merged(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("loss_settings = {clip = 0.3, detach_lambda = true}\n")
    resolved = plan.resolve("train", {**GIVEN, "loss_settings": {"clip": 0.5}}, str(tmp_path / "a.toml"))
    assert resolved["loss_settings"] == {"clip": 0.5, "detach_lambda": True}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"beta": 0.0}, r"command line: beta = 0\.0: it must be a finite number, above 0 and at most"),
        ({"beta": float("nan")}, r"command line: beta = nan: it must be a finite number"),
        ({"batch_size": 0}, r"command line: batch_size = 0: it must be a whole number from 1"),
        ({"batch_size": True}, r"command line: batch_size = True; it must be of type int"),
        ({"epochs": "2"}, r"command line: epochs = '2'; it must be of type float"),
        ({"label": "better"}, r"label = 'better': it must be one of 'helpful', 'safe', 'overall'"),
        ({"betta": 1.0}, r"command line: no setting 'betta'; near it: beta"),
        ({"samples": 3}, r"command line: samples is no setting of train, but of evaluate"),
        ({"model": None}, r"model must be given, by --model or in a file"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(plan.PlanError, match=message):
        plan.resolve("train", {**GIVEN, **flags})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "beta = ", "is no valid toml"),
        ("a.json", "[1]", "holds list; it must hold settings"),
        ("a.ini", "", r"the ending '\.ini' is none of"),
        ("a.toml", "beta = -1\n", r"file .*a\.toml: beta = -1\.0: it must be"),
        ("a.toml", "runs = ['x']\n", "runs is no setting of train, but of compare"),
        ("a.toml", "[sources]\nbeta = 3\n", "sources must give words"),
    ],
)
def test_a_wrong_file_is_refused_by_name(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(plan.PlanError, match=message):
        plan.resolve("train", GIVEN, str(tmp_path / name))


def test_a_missing_file_names_those_that_are_shipped() -> None:
    with pytest.raises(plan.PlanError, match=r"no configuration file nowhere; .*llama-7b-safe-rlhf"):
        plan.resolve("train", GIVEN, "nowhere")


# ---------------------------------------------------------------- the paper's settings


@pytest.mark.parametrize("name", plan.shipped())
def test_shipped_files_say_where_every_value_comes_from(name: str) -> None:
    given, sources = plan.read_config(name)
    assert set(given) == set(sources)
    assert all(words.startswith(("our choice: ", plan.PAPER)) for words in sources.values())
    resolved = plan.resolve("train", {"out": "o"}, name)
    assert resolved["epochs"] == 2
    assert "Appendix B" in resolved.sources["epochs"]


def test_the_naive_variants_use_the_clip_of_the_paper() -> None:
    assert plan.resolve("train", {"out": "o"}, "llama-7b-safe-rlhf-nbdpo")["loss_settings"] == {"clip": 0.3}


def test_the_plan_prints_one_line_a_setting() -> None:
    resolved = plan.resolve("train", {**GIVEN, "loss_settings": {"clip": 0.3}})
    lines = str(resolved).splitlines()
    assert len(lines) == len(resolved.settings)
    assert any(re.fullmatch(r"loss_settings +clip=0\.3 +command line", line) for line in lines)
    assert json.loads(json.dumps(resolved.as_dict()))["settings"]["beta"] == 0.1


# ---------------------------------------------------------------- the report


class Page(HTMLParser):
    """Notes what a page opens, closes and refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "line", "path", "text"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "line", "path", "text"):
            assert self.open.pop() == tag


def write(folder: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "title": "bDPO <on> a & b",
        "status": "finished",
        "plan": plan.resolve("train", GIVEN).as_dict(),
        "numbers": {"eval_loss": 0.5, "rewards/margins": float("nan")},
        "tables": {"Help": [{"method": "dpo", "mean": 1.0}, {"method": "bdpo", "mean": 2.0}]},
        "history": [{"step": k, "loss": 1 / (k + 1)} for k in range(4)],
        "notes": ["2 rows dropped: <empty>"],
        "seconds": 1.5,
    }
    return report.write(folder, **{**settings, **more})


def test_report_is_valid_self_contained_html_and_strict_json(tmp_path: Path) -> None:
    written = write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert found == written
    assert found["results"]["rewards/margins"] is None
    assert {"commit", "versions", "hardware", "finished", "seconds"} <= set(found)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert "bDPO &lt;on&gt; a &amp; b" in text
    assert "&lt;empty&gt;" in text
    assert page.seen.count("svg") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_report_of_a_failed_run_shows_it(tmp_path: Path) -> None:
    write(tmp_path, status="diverged at step 7", history=[])
    assert '<p class="failed"><strong>diverged at step 7' in (tmp_path / "report.html").read_text()


def test_a_curve_needs_two_finite_points(tmp_path: Path) -> None:
    rows = [{"step": 1, "a": 1.0, "b": float("inf")}, {"step": 2, "b": 1.0}, {"step": 3, "c": "word"}]
    assert list(report.curves(rows)) == []
