"""The built book in a browser: it loads, is legible, accessible, and hangs together without any other server.

Skipped, with the reason, where the book is not built or no Chromium is installed;
that is a failure where ``CI`` is set.
Each checker is also shown a page that it must reject.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")

HTML = Path(__file__).parent.parent / "_build/html"
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html") if "_static" not in p.parts)
PAGES = [page for page in PAGES if page != "index.html"]  # it only leads to the first page
CHAPTERS = [page for page in PAGES if page.startswith(("book/", "notebooks/"))]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # whatever a page asks of another machine fails
]


def missing(what: str) -> None:
    """Skip, or fail where nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, (*BROWSERS, own))), None)
        if path is None:
            missing("no Chromium is installed, so the book was not looked at")
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site():
    """Address of the built book."""
    if not (HTML / "index.html").exists():
        missing("the book is not built: run make book")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Requests are no news."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def tab(browser):
    context = browser.new_context(viewport=DESK, color_scheme="light", reduced_motion="reduce")
    yield context.new_page()
    context.close()


def visit(tab, address):
    """Open a page and wait for its formulas; return what went wrong on the way."""
    wrong = []
    listeners = {
        "console": lambda message: message.type in ("error", "warning") and wrong.append(f"console: {message.text}"),
        "pageerror": lambda error: wrong.append(f"exception: {error}"),
        "requestfailed": lambda request: wrong.append(f"failed: {request.url}"),
        "response": lambda response: response.status >= 400 and wrong.append(f"{response.status}: {response.url}"),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.set_viewport_size(DESK)
    tab.goto(address)
    tab.add_style_tag(content="* { transition: none !important; animation: none !important; }")
    tab.evaluate("() => window.MathJax?.startup?.promise.then(() => true)")
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    return wrong


# Checkers: each returns what is wrong with the page that is open, in words.


def untypeset(tab):
    """Formulas that MathJax did not understand, or did not see."""
    return tab.evaluate(
        r"""() => {
        const wrong = [...document.querySelectorAll("mjx-merror")].map((e) => "merror: " + e.textContent);
        for (const math of document.querySelectorAll(".math"))
            if (!math.querySelector("mjx-container")) wrong.push("not typeset: " + math.textContent.slice(0, 80));
        const article = document.querySelector("article, main") ?? document.body;
        const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const { parentElement, data } = texts.currentNode;
            if (!parentElement.closest("pre, code, script, style, .math") && /\\[([]|\$[^$\s][^$]*\$/.test(data))
                wrong.push("TeX in the text: " + data.trim().slice(0, 80));
        }
        return wrong;
    }"""
    )


def overflowing(tab):
    """Whether the page scrolls sideways, and the first elements that stick out."""
    return tab.evaluate(
        """() => {
        const { clientWidth, scrollWidth } = document.documentElement;
        if (Math.max(scrollWidth, document.body.scrollWidth) <= clientWidth) return [];
        const inside = (e) => e && (getComputedStyle(e).overflowX !== "visible" || inside(e.parentElement));
        const wide = [...document.body.querySelectorAll("*")].filter(
            (e) => e.getBoundingClientRect().right > clientWidth + 1 && !inside(e.parentElement));
        return ["wider than the window", ...wide.slice(0, 5).map((e) => e.outerHTML.slice(0, 120))];
    }"""
    )


def clipped(tab):
    """Formulas of which a part can neither be seen nor be scrolled to."""
    return tab.evaluate(
        """() => [...document.querySelectorAll(".math")]
            .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 2)
            .filter((e) => getComputedStyle(e).overflowX === "hidden")
            .map((e) => "clipped: " + e.textContent.slice(0, 80))"""
    )


def unnamed_images(tab):
    """Images of the text without words for somebody who cannot see them."""
    images = tab.evaluate(
        """() => [...(document.querySelector("article, main") ?? document.body).querySelectorAll("img")]
                 .map((e) => [e.getAttribute("alt"), e.src.slice(0, 80)])"""
    )
    path = re.compile(r"\S*(/\S*|\.(png|svg|jpe?g|gif))")
    return [f"alt={alt!r}: {src}" for alt, src in images if not (alt or "").strip() or path.fullmatch(alt.strip())]


def repeated_ids(tab):
    return tab.evaluate(
        """() => { const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
                   return ids.filter((id, place) => ids.indexOf(id) !== place); }"""
    )


def inaccessible(tab, contrast):
    """What axe-core finds serious or critical: about colours, or about all the rest."""
    tab.evaluate(axe.AXE_SCRIPT)
    options = {"runOnly": ["color-contrast"]} if contrast else {"rules": {"color-contrast": {"enabled": False}}}
    found = tab.evaluate(
        """(options) => axe.run({ resultTypes: ["violations"], ...options }).then((results) => results.violations)""",
        options,
    )
    return [
        f"{violation['id']} ({violation['impact']}): {node['html'][:160]} {node['failureSummary']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def unfold(tab):
    """Open what is folded; spare axe-core MathJax's own elements, and the words of all but three pieces of code."""
    tab.evaluate(
        """() => {
        document.querySelectorAll("details").forEach((e) => (e.open = true));
        document.querySelectorAll(".math").forEach((e) => e.replaceChildren("formula"));
        [...document.querySelectorAll("pre")].slice(3).forEach((e) => e.replaceChildren(e.textContent));
    }"""
    )


def thin_out(tab):
    """Of texts that look the same (tag and classes, also of the ancestors) leave two: measuring colours is slow."""
    tab.evaluate(
        """() => {
        const kind = (e) => (e ? kind(e.parentElement) + " " + e.tagName + e.className : "");
        const seen = {};
        for (const e of [...document.querySelectorAll("body *")].reverse()) {
            const texts = [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
            const name = texts && kind(e).replace(/row-(odd|even)/g, "");
            if (texts && !e.children.length && (seen[name] = (seen[name] ?? 0) + 1) > 2) e.remove();
        }
    }"""
    )


def illegible(tab, theme):
    """Texts whose colour is too near to what is behind them."""
    tab.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
    return [f"in {theme}: {problem}" for problem in inaccessible(tab, contrast=True)]


class Anchors(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


def broken_links(folder):
    """Links between pages, or to files, of a site that lead nowhere."""
    parsed = {
        page.relative_to(folder).as_posix(): Anchors(page.read_text("utf-8"))
        for page in folder.rglob("*.html")
        if "_static" not in page.parts
    }
    broken = []
    for page, anchors in parsed.items():
        for link in anchors.links:
            parts = urlsplit(urljoin(f"http://site/{page}", link))
            if parts.scheme != "http" or parts.netloc != "site":
                continue
            target, anchor = unquote(parts.path).lstrip("/") or "index.html", unquote(parts.fragment)
            if not (folder / target).is_file() or (anchor and target in parsed and anchor not in parsed[target].ids):
                broken.append(f"{page} -> {link}")
    return sorted(broken)


# The book


@pytest.mark.parametrize("page", PAGES or ["book/index.html"])
def test_page(site, tab, page):
    wrong = visit(tab, site + page)
    wrong += untypeset(tab) + unnamed_images(tab) + repeated_ids(tab) + overflowing(tab)
    tab.set_viewport_size(PHONE)
    wrong += [f"on a phone: {problem}" for problem in overflowing(tab) + clipped(tab)]
    tab.set_viewport_size(DESK)
    if page in CHAPTERS:
        unfold(tab)
        wrong += inaccessible(tab, contrast=False)
        thin_out(tab)
        wrong += illegible(tab, "light") + illegible(tab, "dark")
    assert not wrong, "\n".join(wrong)


def test_front_door(site, tab):
    tab.goto(site)
    tab.wait_for_url("**/book/index.html")


def test_no_link_leads_nowhere(site):
    assert broken_links(HTML) == []


def test_works_without_a_server(tab):
    if not CHAPTERS:
        missing("the book is not built: run make book")
    assert visit(tab, (HTML / CHAPTERS[-1]).as_uri()) == []
    assert tab.locator(".math").count() > 0
    assert untypeset(tab) == []


def test_paper_is_white(site, tab):
    visit(tab, site + "book/index.html")
    theme = "document.documentElement.dataset.theme"
    tab.evaluate(f"{theme} = 'dark'")
    assert tab.evaluate(f"dispatchEvent(new Event('beforeprint')), {theme}") == "light"
    assert tab.evaluate(f"dispatchEvent(new Event('afterprint')), {theme}") == "dark"


def test_search_finds(site, tab):
    visit(tab, site + "search.html?q=softmax")
    tab.locator("#search-results li").first.wait_for()


@pytest.fixture(scope="module")
def claims(site):
    return json.loads((HTML / "claims.json").read_text("utf-8"))["claims"]


def shown(tab):
    return tab.locator("table.verdicts tbody tr:visible").evaluate_all("rows => rows.map((row) => row.id)")


def test_verdicts_without_script(site, browser, claims):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(site + "book/verdicts.html")
    assert [row.get_attribute("id") for row in tab.locator("table.verdicts tbody tr").all()] == [
        c["id"] for c in claims
    ]
    context.close()


def test_verdicts_sort_by_keyboard(site, tab, claims):
    visit(tab, site + "book/verdicts.html")
    ids = [claim["id"] for claim in claims]
    header = tab.locator("table.verdicts th", has_text="Claim")
    natural = sorted(ids, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    for state, order in {"ascending": natural, "descending": natural[::-1], "none": ids}.items():
        header.locator("button").press("Enter")
        assert header.get_attribute("aria-sort") == state
        assert shown(tab) == order


def test_verdicts_filter(site, tab, claims):
    visit(tab, site + "book/verdicts.html")
    for verdict in {claim["verdict"] for claim in claims}:
        chip = tab.locator(".verdict-chip", has=tab.locator(f".badge-{verdict}"))
        chip.click()
        assert chip.get_attribute("aria-pressed") == "true"
        assert shown(tab) == [claim["id"] for claim in claims if claim["verdict"] == verdict]
        assert chip.inner_text().split()[-1] == str(len(shown(tab)))
        chip.click()
    tab.get_by_label("Filter").fill("eq-2 §3.1")
    assert shown(tab) == ["eq-2"]
    assert tab.get_by_role("status").inner_text().startswith("1 of ")
    tab.get_by_label("Filter").fill("no such statement")
    assert shown(tab) == []


def test_verdicts_address_of_a_verdict(site, tab, claims):
    visit(tab, site + "book/verdicts.html?verdict=open")
    assert shown(tab) == [claim["id"] for claim in claims if claim["verdict"] == "open"]


def test_verdicts_address_of_a_row(site, tab, claims):
    last = claims[-1]["id"]
    visit(tab, f"{site}book/verdicts.html#{last}")
    sync_api.expect(tab.locator(f"#{last}")).to_be_in_viewport()
    tab.get_by_label("Filter").fill("eq-2 §3.1")
    tab.evaluate("location.hash = 'eq-3'")
    sync_api.expect(tab.locator("#eq-3")).to_be_in_viewport()


def test_dark_and_back(site, browser):
    context = browser.new_context(color_scheme="light", viewport=DESK)
    tab = context.new_page()
    pages = [page for page in CHAPTERS if "bdpo-figure" in (HTML / page).read_text("utf-8")]
    tab.goto(site + (pages or ["book/index.html"])[0])
    seen = set()
    for _ in range(3):  # light, dark, and as the system has it
        tab.get_by_role("button", name="Color mode").click()
        theme = tab.evaluate("document.documentElement.dataset.theme")
        seen.add((theme, tab.evaluate("getComputedStyle(document.body).backgroundColor")))
        for figure in tab.locator("figure.bdpo-figure").all():
            assert figure.locator("img:visible").get_attribute("class") == f"only-{theme}"
    assert sorted(theme for theme, _ in seen) == ["dark", "light"]
    assert len({colour for _, colour in seen}) == 2
    context.close()


# The checkers can fail


def structure(tab):
    return inaccessible(tab, contrast=False)


def colours(tab, theme="light"):
    unfold(tab)
    thin_out(tab)
    return illegible(tab, theme)


def in_dark(tab):
    return colours(tab, "dark")


BAD = {
    "merror": (
        untypeset,
        '<mjx-container><mjx-merror data-mjx-error="x">Undefined control sequence</mjx-merror></mjx-container>',
    ),
    "left as it was": (untypeset, r'<span class="math">\(\frac{1\)</span>'),
    "dollars": (untypeset, "<p>for all $x$ in</p>"),
    "too wide": (overflowing, '<div style="width: 3000px; height: 1px"></div>'),
    "clipped": (
        clipped,
        '<div class="math" style="overflow: hidden; width: 50px"><div style="width: 90px">x</div></div>',
    ),
    "no alt": (unnamed_images, '<img src="data:,">'),
    "empty alt": (unnamed_images, '<img src="data:," alt=" ">'),
    "path as alt": (unnamed_images, '<img src="data:," alt="../_images/plot.png">'),
    "ids": (repeated_ids, '<p id="a"></p><p id="a"></p>'),
    "nameless button": (structure, "<button></button>"),
    "pale": (colours, '<p style="color: #ccc">pale</p>'),
    "pale among others": (colours, "<p>dark</p>" * 3 + '<p style="color: #ccc" class="pale">pale</p>'),
    "pale in dark": (in_dark, "<style>[data-theme=dark] p { background: #222; color: #444 }</style><p>dark</p>"),
    "pale in a fold": (colours, '<details><summary>s</summary><p style="color: #ccc">pale</p></details>'),
}
GOOD = """<!doctype html><html lang="en"><title>Good</title><main><h1>Good</h1><p id="a">Costs $5.</p>
<span class="math"><mjx-container></mjx-container></span><img src="data:," alt="A falling curve"></main></html>"""


@pytest.mark.parametrize(
    "check", list(dict.fromkeys(check for check, _ in BAD.values())), ids=lambda check: check.__name__
)
def test_checker_accepts(browser, check):
    tab = browser.new_page()
    tab.set_content(GOOD)
    assert check(tab) == []
    tab.close()


@pytest.mark.parametrize(("check", "content"), BAD.values(), ids=BAD)
def test_checker_rejects(browser, check, content):
    tab = browser.new_page()
    tab.set_content(f'<!doctype html><html lang="en"><title>Bad</title><main><h1>Bad</h1>{content}</main></html>')
    assert len(check(tab)) >= 1
    tab.close()


def test_visit_reports(site, browser):
    tab = browser.new_page()
    wrong = visit(tab, site + "no-such-page.html")
    assert any(line.startswith("404") for line in wrong)
    tab.route(
        "**/bad.html",
        lambda route: route.fulfill(
            body="<script src='https://example.org/x.js'></script><script>f()</script>", content_type="text/html"
        ),
    )
    wrong = visit(tab, site + "bad.html")
    assert any("example.org" in line for line in wrong)
    assert any(line.startswith("exception: f is not defined") for line in wrong)
    tab.close()


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a id="x" href="b.html#y"></a><a href="b.html#z"></a><a href="https://else.where/"></a>'
    )
    (tmp_path / "b.html").write_text('<p id="y"></p><a href="a.html#x"></a><img src="gone.svg">')
    assert broken_links(tmp_path) == ["a.html -> b.html#z", "b.html -> gone.svg"]
