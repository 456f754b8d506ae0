"""The dashboard in a real browser: accessible, usable by keyboard, and steady for ten minutes.

Not part of the suite: it needs Chromium, Playwright and axe-core.

    pip install playwright && npm install axe-core        # and Chromium, as the system has it
    AXE=node_modules/axe-core/axe.min.js python -m pytest tests/server/browser_dashboard.py \\
        -o python_files="*.py"

`SHOTS=FOLDER` keeps screenshots; `SOAK_S=600` listens for ten minutes instead of none.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
AXE = os.environ.get("AXE")
SHOTS = os.environ.get("SHOTS")
SOAK_S = float(os.environ.get("SOAK_S", "0"))
SIZES = {"light": (1400, 900), "dark": (1400, 900), "phone": (360, 780)}
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(360 + 2 * int(SOAK_S)),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; set CHROMIUM"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Address and process id of a server with something to show."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "tests.server.dashboard_demo", str(folder),
               "--pause", os.environ.get("PAUSE_S", "2")]  # fmt: skip
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip(), process.pid
        finally:
            process.stdin.close()
            process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--enable-precise-memory-info"]
        )
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any, demo: tuple[str, int]) -> Iterator[Callable[..., Any]]:
    """Open the dashboard; the test fails on any error that its console shows."""
    contexts, errors = [], []

    def open_one(size: str = "light", prepare: Callable[[Any], object] = lambda _: None) -> Any:
        width, height = SIZES[size]
        scheme = "dark" if size == "dark" else "light"
        context = browser.new_context(viewport={"width": width, "height": height},
                                      color_scheme=scheme, reduced_motion="reduce")  # fmt: skip
        contexts.append(context)
        if AXE is not None:
            context.add_init_script(path=AXE)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda each: errors.append(each.text) if each.type == "error" else None)
        prepare(page)
        page.goto(demo[0])
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not [each for each in errors if "Failed to load resource" not in each]


def wait_live(page: Any) -> Any:
    page.wait_for_selector('#connection[data-state="live"]', timeout=20_000)
    page.wait_for_timeout(1200)
    return page


def wait_text(page: Any, selector: str, begin: str, timeout_s: float = 90) -> str:
    """Wait until an element's text begins so; the page's policy forbids doing it in the page."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        text = str(page.inner_text(selector))
        if text.startswith(begin):
            return text
        page.wait_for_timeout(100)
    raise AssertionError(f"{selector} says {text!r}, not {begin!r}")


def say(page: Any, text: str, model: str = "smollm2", n: int = 40) -> None:
    page.select_option("#chat-model", model)
    page.evaluate(f"document.getElementById('chat-max').value = {n}")
    page.fill("#chat-input", text)
    page.press("#chat-input", "Enter")


def shoot(page: Any, name: str, *, full: bool = False) -> None:
    if SHOTS is not None:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=full)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_accessible_and_shows_everything(size: str, open_page: Callable[..., Any]) -> None:
    page = wait_live(open_page(size))
    say(page, "Why is the sky blue? Answer in one sentence.")
    wait_text(page, "#chat-status", "Answered")
    assert page.input_value("#view") == "smollm2"  # it shows the model that answered
    page.wait_for_timeout(1500)
    assert "of 5" in page.inner_text("#lever-adapters")
    shoot(page, f"{size}-chat")
    page.select_option("#view", "moe")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(3000)
    shoot(page, size, full=True)
    shoot(page, f"{size}-top")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert page.locator("#heat-map").is_visible()
    assert int(page.inner_text("#heat-sum").split()[0]) > 0
    if AXE is None:
        pytest.skip("axe-core is not there: set AXE to its axe.min.js")
    check_axe(page)
    for summary in page.locator("summary").all():
        summary.click()
    page.click("#key-toggle")
    page.wait_for_timeout(1200)
    assert page.locator("#heat-rows tr").count() == 24
    check_axe(page)


def check_axe(page: Any) -> None:
    """No violation that axe calls serious or critical; minor ones are printed."""
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    told = [(each["impact"], each["id"], [node["target"] for node in each["nodes"]][:4])
            for each in found]  # fmt: skip
    print(f"axe: {len(told)} violations {told}")
    assert not [each for each in told if each[0] in ("serious", "critical")], json.dumps(told)


def test_it_can_be_used_by_keyboard_alone(open_page: Callable[..., Any]) -> None:
    page = wait_live(open_page())
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        now = page.evaluate("""() => {
            const at = document.activeElement, style = getComputedStyle(at);
            return [at.id || at.tagName, style.outlineStyle, parseFloat(style.outlineWidth)];
        }""")
        if now[0] == "BODY":
            break
        seen.append(now)
    names = [each[0] for each in seen]
    assert names[0] == "A"  # the way past the bar
    assert [
        each
        for each in names
        if each
        in ("view", "key-toggle", "theme", "chat-log", "chat-model", "chat-input", "chat-send")
    ] == ["view", "key-toggle", "theme", "chat-log", "chat-model", "chat-input", "chat-send"]
    assert all(style != "none" and width >= 1 for _, style, width in seen), seen
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_timeout(200)
    assert page.evaluate("document.activeElement.id") == "chat-input"
    page.select_option("#chat-model", "smollm2")
    for _ in range(5):  # an answer that is drawn may be over before anybody looks
        page.keyboard.type("Count to one hundred, please.")
        page.keyboard.press("Enter")
        if wait_text(page, "#chat-status", "Answer").startswith("Answering"):
            break
        page.focus("#chat-input")
    page.keyboard.press("Escape")
    wait_text(page, "#chat-status", "Stopped")
    page.focus("#theme")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.focus("#key-toggle")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "key"


def test_an_answer_shows_its_cost_and_takes_feedback(open_page: Callable[..., Any]) -> None:
    page = wait_live(open_page())
    say(page, "Say hello.", model="smollm2:auto")
    wait_text(page, "#chat-status", "Answered with")
    told = page.inner_text("#chat-log .figures")
    for word in ("tok/s", "TTFT", "cached", "adapter"):
        assert word in told
    page.click("text=Good")
    wait_text(page, "#chat-log .thumbs [role=status]", "noted")
    assert page.locator("#chat-log .thumbs button:disabled").count() == 2
    say(page, "And now again.")
    wait_text(page, "#chat-status", "Answered with")
    page.click("#chat-clear")
    assert page.locator("#chat-log article").count() == 0
    say(page, "What is this?", model="moe")
    wait_text(page, "#chat-status", "Answered with")
    assert "expert hits" in page.inner_text("#chat-log .figures")
    assert page.input_value("#view") == "moe"
    refusal = {"error": {"message": "no room for the model; try again in 5 s"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, json=refusal))
    say(page, "Once more.")
    wait_text(page, "#chat-status", "No whole answer")
    assert refusal["error"]["message"] in page.inner_text("#chat-log .error")


def test_stop_ends_the_request_on_the_server(open_page: Callable[..., Any]) -> None:
    page = wait_live(open_page())
    say(page, "Write a long story about a robot.", n=1500)
    wait_text(page, "#chat-status", "Answering")
    page.click("#chat-stop")
    wait_text(page, "#chat-status", "Stopped")
    until = time.monotonic() + 20
    while "499 left" not in page.inner_text("#requests-rows"):
        assert time.monotonic() < until
        page.wait_for_timeout(200)
    assert page.locator("#chat-send").is_enabled()


def test_what_a_model_writes_is_text(open_page: Callable[..., Any]) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    chunk = {"choices": [{"delta": {"content": evil}}], "edgeroute": {"id": evil, "adapter": evil}}
    steps = [{"index": 0, "model": "small", "n_tokens": 3, "seconds": 0.1},
             {"index": 1, "model": "large", "n_tokens": 2, "seconds": 0.1}]  # fmt: skip
    stats = {"n_generated": 5, "n_prompt": 1, "n_cached": 0, "ttft_s": 0.1, "decode_tok_s": 9.0,
             "steps": steps, "depth": {"layers_run": 20, "layers_total": 24}}  # fmt: skip
    last = {"choices": [], "edgeroute": {"stats": stats}}
    body = "".join(f"data: {json.dumps(each)}\n\n" for each in (chunk, last)) + "data: [DONE]\n\n"
    page = wait_live(open_page())
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        body=body, content_type="text/event-stream"))  # fmt: skip
    say(page, "anything")
    wait_text(page, "#chat-status", "Answered with 5")
    assert page.inner_text("#chat-log .assistant .text") == evil
    assert page.locator("#chat-log img, #chat-log script").count() == 0
    told = page.inner_text("#chat-log .foot")
    assert "20 of 24" in told and "small model (S): 1 step, 3 tokens" in told
    if AXE is not None:
        check_axe(page)
        page.emulate_media(color_scheme="dark")
        check_axe(page)


def test_it_comes_back_by_itself_and_asks_for_a_key(open_page: Callable[..., Any]) -> None:
    page = open_page(prepare=lambda page: page.route("**/edgeroute/live", lambda r: r.abort()))
    wait_text(page, "#connection-text", "no connection, next try in")
    page.unroute("**/edgeroute/live")
    page.click("#retry")
    wait_live(page)
    refuse = {"error": {"message": "an API key is needed"}}

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json=refuse)

    page.route("**/edgeroute/live", guard)
    page.reload()
    wait_text(page, "#connection-text", "the server wants an API key")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    wait_text(page, "#connection-text", "the server wants an API key")
    page.fill("#key", "right")
    page.press("#key", "Enter")
    wait_live(page)
    kept = page.evaluate("[JSON.stringify(localStorage), sessionStorage['edgeroute-api-key']]")
    assert "right" not in kept[0] and kept[1] == "right"


@pytest.mark.skipif(SOAK_S < 120, reason="SOAK_S is not at least 120")
def test_it_listens_for_long_without_growth(
    open_page: Callable[..., Any], demo: tuple[str, int]
) -> None:
    """First against last minute: the page's heap after a collection, and the server's memory.

    Both begin when the models have been at work for a while: what they fill is not the page's.
    """
    page = wait_live(open_page())
    page.select_option("#view", "moe")
    warm = time.monotonic() + 240
    while int(page.locator("#requests-rows td").first.inner_text()) < 62:
        assert time.monotonic() < warm
        page.wait_for_timeout(1000)
    session = page.context.new_cdp_session(page)
    server = psutil.Process(demo[1])
    began, readings = time.monotonic(), []
    states: Counter[str] = Counter()
    while time.monotonic() - began < SOAK_S:
        session.send("HeapProfiler.collectGarbage")
        heap = session.send("Runtime.getHeapUsage")["usedSize"]
        nodes = session.send("Memory.getDOMCounters")["nodes"]
        readings.append((time.monotonic() - began, heap, server.memory_info().rss, nodes))
        states[page.get_attribute("#connection", "data-state")] += 1
        page.wait_for_timeout(5000)
    print(f"every 5 s the connection was {dict(states)}")

    def middle(column: int, first: bool) -> float:
        return median(each[column] for each in readings
                      if (each[0] < 60 if first else each[0] > SOAK_S - 60))  # fmt: skip

    for name, column in (("heap", 1), ("rss", 2), ("nodes", 3)):
        before, after = middle(column, True), middle(column, False)
        print(f"{name}: first minute {before:,.0f}, last {after:,.0f}, {after / before - 1:+.1%}")
    assert set(states) == {"live"}
    # Five minutes of history fill up meanwhile: 4 charts and up to 4 models, 300 points each.
    assert middle(1, False) < middle(1, True) + (2 << 20)
    assert middle(2, False) < middle(2, True) * 1.03
