"""Figures: legible in both schemes, the same in every run, with words and numbers for everybody."""

import base64
import csv
import io
import re
import subprocess
import sys
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from bdpo import figures


def draw(fig):
    ax = fig.subplots()
    for name in figures.LINE:
        ax.plot([0, 1, 2], [len(name), 1, 2], **figures.LINE[name], label=name)
    ax.set(xlabel="step $t$", title=r"$\pi_w$")
    ax.legend()


GOOD = {"name": "fig-good", "alt": "Six lines.", "caption": "Lines.", "data": {"t": [0, 1, 2], "p": [0.5, 0.25, 0.125]}}


def decoded(html, kind):
    return [base64.b64decode(code).decode() for code in re.findall(rf"data:{kind}[^,]*,([A-Za-z0-9+/=]+)", html)]


# What is shown


def test_one_figure_holds_both_schemes_words_and_numbers():
    html = figures.render(draw, **GOOD)
    assert html.startswith('<figure class="bdpo-figure" id="fig-good">')
    light, dark = decoded(html, "image/svg")
    assert light.count("<svg") == dark.count("<svg") == 1
    assert light != dark
    assert html.count('alt="Six lines."') == 2
    assert re.search(r'class="only-dark"[^>]*style="display: none"', html)  # viewers that know no dark mode show one


def test_caption_is_outside_the_box_of_the_images():
    # The theme hides every figcaption that follows an image of the other scheme in the same box.
    assert "</div><figcaption>" in figures.render(draw, **GOOD)


def test_formulas_and_special_characters_of_the_caption():
    html = figures.render(draw, **{**GOOD, "caption": r"If $a < b$, <then> & $\pi$", "alt": 'a "quoted" <word>'})
    assert r'If <span class="math notranslate nohighlight">\(a &lt; b\)</span>, &lt;then&gt; &amp; ' in html
    assert 'alt="a &quot;quoted&quot; &lt;word&gt;"' in html


def test_numbers_come_back_exactly():
    values = np.array([0.1, 1e-300, -2.5])
    html = figures.render(draw, **{**GOOD, "data": {"label, with comma": ["a", 'b"', "c"], "x": values, "n": range(3)}})
    rows = list(csv.DictReader(io.StringIO(decoded(html, "text/csv")[0])))
    assert [float(row["x"]) for row in rows] == values.tolist()
    assert [row["label, with comma"] for row in rows] == ["a", 'b"', "c"]
    assert [int(row["n"]) for row in rows] == [0, 1, 2]
    assert 'download="fig-good.csv"' in html


def test_fractions_stay_exact():
    html = figures.render(draw, **{**GOOD, "data": {"q": [Fraction(1, 3), Fraction(-2, 7)]}})
    assert decoded(html, "text/csv")[0].split() == ["q", "1/3", "-2/7"]


def test_show_displays_the_same_as_render(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    assert figures.show(draw, **GOOD) is None
    assert [output.data for output in shown] == [figures.render(draw, **GOOD)]


def test_the_same_bytes_in_another_process():
    code = "import sys; sys.path[:0] = ['tests']; import test_figures as t; print(t.figures.render(t.draw, **t.GOOD))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == figures.render(draw, **GOOD)


def test_two_figures_differ_in_their_inner_ids():
    inner = [set(re.findall(r'id="(\w{11,})"', decoded(figures.render(draw, **{**GOOD, "name": n}), "image/svg")[0]))
             for n in ("fig-a", "fig-b")]  # fmt: skip
    assert inner[0]
    assert not inner[0] & inner[1]


def test_styles_do_not_leak():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.render(draw, **GOOD)
    assert dict(matplotlib.rcParams) == before


def test_package_does_not_load_matplotlib():
    code = "import sys, bdpo; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Colours


def linear(colour):
    """Linear red, green and blue of ``#rrggbb``."""
    srgb = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """Contrast ratio of WCAG 2."""
    bright, dim = sorted((0.05 + linear(c) @ (0.2126, 0.7152, 0.0722) for c in (a, b)), reverse=True)
    return bright / dim


#: What each kind of colour blindness leaves of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(rgb):
    """CIELAB of linear RGB, white D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(np.clip(xyz / (0.9505, 1, 1.089), 0, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def too_close(colours, sight):
    """Pairs of colours that somebody with this sight can hardly tell apart, by name."""
    seen = {name: lab(np.asarray(SIGHT[sight]) @ linear(colour)) for name, colour in colours.items()}
    return [pair for pair in combinations(seen, 2) if np.linalg.norm(seen[pair[0]] - seen[pair[1]]) < 15]


@pytest.mark.parametrize("page", ["#ffffff", "#12161c"], ids=["light", "dark"])
@pytest.mark.parametrize("name", figures.COLOR)
def test_lines_stand_out_from_the_page(name, page):
    assert contrast(figures.COLOR[name], page) >= 3


def test_dark_page_is_the_one_of_the_style_sheet(root):
    sheet = (root / "book/_static/custom.css").read_text("utf-8")
    assert "--pst-color-background: #12161c;" in sheet


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_can_be_told_apart(sight):
    assert too_close(figures.COLOR, sight) == []


def test_telling_apart_can_fail():
    assert too_close({"red": "#b03010", "olive": "#6f6a10"}, "deuteranopia") == [("red", "olive")]
    assert too_close({"red": "#b03010", "olive": "#6f6a10"}, "normal") == []


def test_series_differ_by_more_than_colour():
    styles = {name: line["linestyle"] for name, line in figures.LINE.items()}
    for pair in [("dpo", "balanced"), ("dpo", "ppo"), ("balanced", "ppo"), ("winner", "loser")]:
        assert styles[pair[0]] != styles[pair[1]]
    assert {name: line["color"] for name, line in figures.LINE.items()} == figures.COLOR


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Fig 1"}, "name is 'Fig 1'; it becomes a link target"),
        ({"alt": " "}, "alt of 'fig-good' is empty"),
        ({"caption": ""}, "caption of 'fig-good' is empty"),
        ({"data": {}}, "data of 'fig-good' is empty"),
        ({"data": {"a": [1, 2], "b": [1]}}, r"shapes .*'a': \(2,\), 'b': \(1,\)"),
        ({"data": {"a": []}}, r"shapes .*\(0,\)"),
        ({"data": {"a": [[1, 2], [3, 4]]}}, r"shapes .*\(2, 2\)"),
        ({"data": {"a": 3}}, r"shapes .*\(\)"),
        ({"size": (0, 3)}, r"size of 'fig-good' is \(0, 3\)"),
        ({"size": (6, 21)}, "at most 20"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        figures.render(draw, **{**GOOD, **change})


@pytest.mark.parametrize("nothing", [lambda fig: None, lambda fig: fig.subplots()], ids=["no axes", "empty axes"])
def test_an_empty_figure_is_refused(nothing):
    with pytest.raises(ValueError, match="drew nothing"):
        figures.render(nothing, **GOOD)


def test_words_alone_are_a_drawing():
    assert "<svg" in decoded(figures.render(lambda fig: fig.subplots().text(0, 0, "word"), **GOOD), "image/svg")[0]
