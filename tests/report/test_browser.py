"""Test pages in a real browser: no errors, no requests, and everything visible and reachable.

The tests use the system's Chromium, which `.ci/run` installs, and are skipped without it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from synthetic_runs import DOMAINS, HOSTILE, write_run
from tiny import save_dense
from training_runs import run_training, tree, write_tokens

from megatron_moe.cli.plan import known_source
from megatron_moe.commands.plan import plan
from megatron_moe.commands.report import compare, report
from megatron_moe.planner.starting import Request, starting_config
from megatron_moe.planner.whole_run import Circumstances

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = """() => [...document.querySelectorAll('svg[role=img]')].map(one => {
    for (let fold = one.closest('details'); fold; fold = fold.parentElement.closest('details'))
        fold.open = true;
    const box = one.getBoundingClientRect();
    return Math.min(box.width, box.height);
})"""
FOCUSED = """() => {
    const at = document.activeElement, style = getComputedStyle(at);
    return [at.tagName, at.getAttribute('href'), style.outlineStyle != 'none'];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a training run on two ranks."""
    root = tmp_path_factory.mktemp("real")
    dense, tokens = save_dense(root / "dense"), write_tokens(root / "tokens")
    domains = {
        name: {"path": str(tokens), "weight": 0.5, "validation_path": str(tokens)}
        for name in ("plain", HOSTILE)
    }
    settings = tree(
        root / "run", dense, tokens, parallel={"expert_parallel_size": 2},
        data={"path": None, "domains": domains, "validation_samples": 4},
        checkpoint={"interval": 2},
    )  # fmt: skip
    run_training(settings, world_size=2)
    return report(root / "run")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of 1000 steps and 128 experts, after checking its size."""
    page = report(write_run(tmp_path_factory.mktemp("large")))
    assert page.stat().st_size < 2_500_000, "was 1.4 MB when written"
    return page


@pytest.fixture(scope="module")
def both(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the comparison page of two runs."""
    folder = tmp_path_factory.mktemp("both")
    other = write_run(folder, steps=500, layers=4, experts=16, name="other", seed=1)
    return compare([large.parent, other], folder / "compare.html")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a plan."""
    path = tmp_path_factory.mktemp("planned") / "plan.html"
    spec, source = known_source("llama-3-70b")
    config = starting_config(Request(source=source, gpus=1024), spec)
    options = {"gpus": 1024, "gpu": "h100", "check_only": False}
    plan(config, spec, Circumstances(price=2.0), **options).write_page(path)
    return path


@pytest.fixture(params=["real", "large", "both", "planned"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


class Opened:
    """A page in a browser window, with its console messages and requests."""

    def __init__(self, browser: Browser, path: Path, *, width: int, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )  # fmt: skip
        self.page: Page = context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def outside(self) -> list[str]:
        """Return requests other than for the page itself and its inline pictures."""
        return [url for url in self.requests[1:] if not url.startswith("data:")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_is_complete_without_a_network(browser: Browser, path: Path, dark: bool):
    opened = Opened(browser, path, width=1280, dark=dark)
    sizes = opened.page.evaluate(SIZES)
    assert (opened.messages, opened.outside()) == ([], [])
    assert len(sizes) >= (4 if path.name == "plan.html" else 8)
    assert min(sizes) > 20
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_a_narrow_screen_does_not_scroll_sideways(browser: Browser, path: Path):
    opened = Opened(browser, path, width=360)
    opened.page.evaluate(SIZES)  # opens collapsed sections
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    labels = opened.page.evaluate(
        "[...document.querySelectorAll('svg[role=img] text')]"
        ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert min(labels) > 8.5, "height of the smallest text in pixels"


def test_the_keyboard_reaches_every_section_and_shows_where_it_is(browser: Browser, path: Path):
    page = Opened(browser, path, width=1280).page
    sections = page.evaluate("[...document.querySelectorAll('section')].map(s => '#' + s.id)")
    reached = []
    while len(reached) < 100:
        page.keyboard.press("Tab")
        tag, link, visible = page.evaluate(FOCUSED)
        if tag == "BODY":  # after the last element
            break
        assert visible, (tag, link)
        reached.append(link or tag)
    assert reached[0] == "#report"  # the link that skips the contents
    assert [link for link in reached if link in sections] == sections
    assert "SUMMARY" in reached  # collapsed tables of numbers
    page.locator(f"nav a[href='{sections[-1]}']").press("Enter")
    assert page.evaluate("location.hash") == sections[-1]


def test_numbers_open_with_the_keyboard(browser: Browser, large: Path):
    page = Opened(browser, large, width=1280).page
    fold = page.locator("figure details").first
    fold.locator("summary").press("Enter")
    assert fold.locator("table").is_visible()
    assert fold.locator("tbody tr").count() > 10


def test_names_are_text_to_a_browser(browser: Browser, large: Path):
    page = Opened(browser, large, width=1280).page
    assert page.locator("script, img").count() == 0
    names = page.evaluate("[...document.querySelectorAll('.legend bdi')].map(b => b.textContent)")
    assert set(DOMAINS) <= set(names)
