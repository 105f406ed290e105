"""
The page in a real browser. Needs Chromium and the package playwright: `make test-browser`.

Screenshots are kept in the folder that the variable SCREENSHOTS names.
"""

import asyncio
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import uvicorn

pytest.importorskip("playwright", reason="make test-browser installs playwright")
from playwright.sync_api import Page, expect, sync_playwright

from free_transformer.explorer.app import create_explorer
from free_transformer.explorer.sources import open_model
from free_transformer.serving.app import listen

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SHIPPED = Path(__file__).parents[2] / "models" / "three-styles"
SEEN = 20_000  # milliseconds to wait for what should appear
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; name it with the variable CHROMIUM")
HTML = "<b id=injected>bold</b><script>document.title='injected'</script>"


@pytest.fixture(scope="module")
def address():
    app = create_explorer(open_model(SHIPPED))
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield found
        found.close()


@pytest.fixture
def visit(address, browser):
    """Opens the page, and at the end checks that it contacted no other host and raised no error."""
    contexts = []

    def open_page(query: str = "", width: int = 1300, scheme: str = "light") -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(SEEN)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address + query)
        return page

    hosts, errors = set(), []
    yield open_page
    for context in contexts:
        context.close()
    assert hosts == {address.split("/")[2]}
    assert errors == []


def texts(page: Page, where: str, count: int) -> list[str]:
    """The texts of a part of the page, once all have ended."""
    page.wait_for_function(
        "([where, count]) => document.querySelectorAll(where + ' .ft-text').length == count && "
        "!document.querySelector(where + ' .ft-cursor')",
        arg=[where, count],
    )
    return page.locator(f"{where} .ft-text").all_inner_texts()


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_a_grid_fills_by_itself_and_is_shuffled(visit):
    page = visit("/?length=40")
    grid = texts(page, "#grid", 20)  # four plans and the baseline, four seeds
    page.locator("#shuffle input").click()
    page.locator("#grid", has_text="plans shuffled").wait_for()
    shuffled = texts(page, "#grid", 20)
    for column in range(4):
        assert sorted(shuffled[column:16:4]) == sorted(grid[column:16:4])
    assert shuffled[16:] == grid[16:]


def test_a_flipped_bit_changes_the_text_and_tokens_tell_why(visit):
    page = visit("/?length=40&tab=flip&prompt=The")
    texts(page, "#pair", 2)
    plan = page.locator("#plan textarea, #plan input").first
    before = plan.input_value()
    page.locator("#bits button:not(.ft-dead)").first.click()
    expect(plan).not_to_have_value(before)
    page.locator("#pair mark").first.wait_for()
    one, other = texts(page, "#pair", 2)
    assert one != other
    token = page.locator("#tokens .ft-token").nth(5)
    token.hover()
    assert "nats from the average over plans" in token.locator(".ft-tip").inner_text()
    screenshot(page, "flip")


def test_dead_bits_say_why(visit):
    page = visit("/?length=5")
    reason = page.locator("#bits button.ft-dead").first.get_attribute("title")
    assert re.search("carries nothing|the same in almost all texts", reason)


def test_a_pasted_text_is_read_and_continued_and_html_stays_text(visit):
    page = visit("/?length=40&tab=read")
    page.locator("#pasted textarea").fill(f"import os\n\n\ndef path(name):\n    return {HTML}")
    page.locator("#read").click()
    page.locator("#certainty tr").first.wait_for()
    assert page.locator("#certainty tr").count() == 8
    page.locator("#continue").click()
    texts(page, "#continued", 1)
    tab(page, "Grid")
    page.locator("#prompt textarea, #prompt input").first.fill(HTML)
    page.locator("#generate").click()
    texts(page, "#grid", 20)
    tab(page, "Flip a bit")
    page.locator("#tokens .ft-token").first.wait_for()
    assert page.locator("#injected").count() == 0
    assert page.title() != "injected"


def test_a_plan_of_the_map_is_shown_and_used(visit):
    page = visit("/?length=40&tab=map")
    circle = page.locator("#map circle").nth(2)
    plan = circle.get_attribute("data-choice")
    circle.click()
    page.locator("#details", has_text=plan).wait_for()
    texts(page, "#under-plan", 2)
    page.locator("#use-map").click()
    page.wait_for_function("plan => document.querySelector('#plan textarea, #plan input').value == plan", arg=plan)
    screenshot(page, "map")


def test_a_link_restores_prompt_plan_and_words(visit, address):
    page = visit("/?length=30&plan=01100110&words=12&prompt=To%20be&temperature=0.9")
    shown = texts(page, "#grid", 20)
    page.get_by_text("Share: link").click()
    wanted = f"{address}/?model=three-styles&prompt=To+be&plan=01100110&words=12"
    page.wait_for_function(
        "wanted => document.querySelector('#link textarea, #link input').value.startsWith(wanted)", arg=wanted
    )
    link = page.locator("#link textarea, #link input").first.input_value()
    again = visit(link.removeprefix(address))
    assert texts(again, "#grid", 20)[:4] == shown[:4]


def test_names_of_plans_are_kept_in_the_browser(visit):
    page = visit("/?length=5")
    page.get_by_text("Share: link").click()
    page.locator("#plan-name textarea, #plan-name input").first.fill("verse")
    bits = page.locator("#plan textarea, #plan input").first.input_value()
    page.locator("#save-name").click()
    page.wait_for_function("document.querySelector('#named input').value == 'verse'")
    page.locator("#plan textarea, #plan input").first.fill("verse")
    page.locator("#plan textarea, #plan input").first.press("Enter")
    page.wait_for_function("bits => document.querySelector('#plan textarea, #plan input').value == bits", arg=bits)
    page.locator("#plan textarea, #plan input").first.fill("nonsense")
    page.locator("#plan textarea, #plan input").first.press("Enter")
    page.locator("text=neither bits").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 400])
def test_nothing_is_wider_than_the_window(visit, width, scheme):
    page = visit("/?length=60", width, scheme)
    texts(page, "#grid", 20)
    for name in ("Grid", "Flip a bit", "Read a text", "Map"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        screenshot(page, f"{name.split()[0].lower()}-{width}-{scheme}")
