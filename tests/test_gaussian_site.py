"""The interactive Gaussian world in a browser: the numbers of Python, by mouse and by keyboard, light and dark.

Skipped, with the reason, where no Chromium is installed; that is a failure where ``CI`` is set.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bdpo.gaussian import curves

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")

SCRIPT = Path(__file__).parent.parent / "book/_static/gaussian.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PAGE = '<!DOCTYPE html><html lang="en"><title>t</title><main><div data-gaussian-explorer>needs JavaScript</div></main>'
SETTINGS = [
    {"mu_p": 45, "mu_q": 55, "sigma_p": 10, "sigma_q": 10, "sampling": "uniform", "reference": "none"},
    {"mu_p": 30, "mu_q": 70, "sigma_p": 10, "sigma_q": 10, "sampling": "shiftless", "reference": "none"},
    {"mu_p": 48.5, "mu_q": 12, "sigma_p": 3.5, "sigma_q": 40, "sampling": "uniform", "reference": "policy"},
    {"mu_p": 0, "mu_q": 99, "sigma_p": 1, "sigma_q": 1, "sampling": "uniform", "reference": "none"},
    {"mu_p": 99, "mu_q": 0.5, "sigma_p": 40, "sigma_q": 1, "sampling": "shiftless", "reference": "policy"},
]


@pytest.fixture(scope="module")
def tab():
    with sync_api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, (*BROWSERS, playwright.chromium.executable_path))), None)
        if path is None:
            message = "no Chromium is installed, so the interactive figure was not looked at"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        yield page
        browser.close()


@pytest.fixture
def page(tab):
    """A page with nothing but the figure; whatever goes wrong in it is an error here."""
    wrong = []

    def note(error):
        wrong.append(error)

    tab.on("pageerror", note)
    tab.set_content(PAGE)
    tab.add_script_tag(path=str(SCRIPT))
    yield tab
    tab.remove_listener("pageerror", note)
    assert wrong == []


def differences(page, params, **changed):
    """The largest difference of each curve between browser and Python, relative to its size."""
    found = page.evaluate("params => window.bdpoGaussian.curves(params)", params)
    expected = curves(**params | changed)
    assert found.keys() == expected.keys()
    return {k: np.abs(np.array(found[k]) - v).max() / np.abs(v).max() for k, v in expected.items()}


@pytest.mark.parametrize("params", SETTINGS)
def test_browser_and_python_agree(page, params):
    assert max(differences(page, params).values()) < 1e-9


def test_the_comparison_can_fail(page):
    params = SETTINGS[0]
    off = differences(page, params, sigma_p=10 + 1e-6)
    assert max(off.values()) > 1e-9
    assert differences(page, params, reference="policy")["w"] > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sigma_p: 0", "sigma_p is 0; it must be above 0"),
        ("mu_q: NaN", "mu_q is NaN"),
        ("sampling: 'online'", "sampling is online"),
        ("reference: 'other'", "reference is other"),
    ],
)
def test_refuses_what_python_refuses(page, change, message):
    world = f"{{mu_p: 45, mu_q: 55, sigma_p: 10, sigma_q: 10, {change}}}"
    with pytest.raises(sync_api.Error, match=message):
        page.evaluate(f"() => window.bdpoGaussian.curves({world})")


def drawn(page, curve):
    return page.locator(f"polyline[data-curve={curve}]").get_attribute("points")


def numbers(page):
    return [row.split("\t") for row in page.locator("tbody tr").all_inner_texts()]


def test_first_view_is_panel_a(page):
    found = curves(45, 55, 10, 10)
    assert page.locator("button[aria-pressed=true]").inner_text() == "a"
    for row, name in zip(numbers(page), ("w", "wp", "dpo", "balanced"), strict=True):
        assert row[1:3] == [str(found[name].argmin()), str(found[name].argmax())]
    assert "needs JavaScript" not in page.locator("main").inner_text()


@pytest.mark.parametrize("panel", "bcdef")
def test_buttons_show_the_panels(page, panel):
    before = drawn(page, "w")
    page.get_by_role("button", name=panel, exact=True).click()
    assert page.locator("button[aria-pressed=true]").all_inner_texts() == [panel]
    assert drawn(page, "w") != before


def test_sliders_answer_to_the_keyboard(page):
    slider = page.get_by_label("μP, mode of the policy")
    before = [drawn(page, curve) for curve in ("w", "wp", "dpo", "balanced")]
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "45.5"
    assert all(drawn(page, c) != b for c, b in zip(("w", "wp", "dpo", "balanced"), before, strict=True))
    assert page.locator("button[aria-pressed=true]").count() == 0
    found = curves(45.5, 55, 10, 10)
    assert [row[1] for row in numbers(page)] == [str(found[k].argmin()) for k in ("w", "wp", "dpo", "balanced")]


def test_reference_and_sampling_are_choices(page):
    page.get_by_label("Reference policy").select_option("policy")
    assert numbers(page)[0][2] == "55"  # the mode of the utility
    page.get_by_label("Sampling of pairs").select_option("shiftless")
    found = curves(45, 55, 10, 10, sampling="shiftless", reference="policy")
    assert numbers(page)[0][1:3] == [str(found["w"].argmin()), str(found["w"].argmax())]


def test_everything_has_a_name(page):
    assert page.get_by_role("slider").count() == 4
    for knob in page.locator("input, select").all():
        assert knob.evaluate("e => e.labels.length") == 1
    labels = [svg.get_attribute("aria-label") for svg in page.get_by_role("img").all()]
    assert len(labels) == 2
    assert all("lowest at" in label for label in labels)


def test_ink_follows_the_page(page):
    inks = set()
    for ink in ("rgb(16, 16, 16)", "rgb(240, 240, 240)"):
        page.evaluate("ink => document.documentElement.style.setProperty('--pst-color-text-base', ink)", ink)
        inks.add(page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill"))
    assert inks == {"rgb(16, 16, 16)", "rgb(240, 240, 240)"}


def test_extreme_settings_draw(page):
    for name, value in (("mu_p", "0"), ("mu_q", "99"), ("sigma_p", "1"), ("sigma_q", "1")):
        page.locator(f"input[name={name}]").fill(value)
    for curve in ("w", "wp", "dpo", "balanced"):
        assert "NaN" not in drawn(page, curve)
