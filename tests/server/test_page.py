"""The chat page in a real browser: it streams, stops and remembers; a model's text is inert."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from http_client import Client, serving

import hybrid

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
QUIET = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update")


def test_the_page_comes_from_this_server_alone(client):
    for path, kind in (("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css")):
        reply = client.get(path)
        assert reply.status == 200
        assert kind in reply.headers["content-type"]
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        addresses = re.findall(rb"https?://[^\s\"'`\\/]+", reply.data)
        assert not addresses, "the page needs nothing from elsewhere"
    assert b"innerHTML" not in client.get("/page.js").data
    assert client.get("/page/index.html").status == 404


def test_the_page_needs_no_key_and_may_be_left_out(engine):
    with serving(engine, api_keys=("key",)) as client:
        assert client.get("/").status == 200
        assert client.get("/page.js").status == 200
        assert client.get("/props").status == 401
    with serving(engine, has_page=False) as client:
        assert client.get("/").status == 404
        assert client.get("/page.js").status == 404


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as tools:
        arguments = [f"--{name}" for name in (*QUIET, "disable-sync", "no-first-run")]
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Page:
    """The page in a browser, as a user sees it."""

    def __init__(self, page: Any, client: Client) -> None:
        self.page, self.client = page, client
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on(
            "console",
            lambda message: self.problems.append(message.text) if message.type == "error" else None,
        )
        self.open()

    def open(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.client.port}/")
        self.page.locator("#model", has_text="stories").wait_for()

    def send(self, text: str, *, waits: bool = True) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if waits:
            self.page.locator("#stop").wait_for(state="hidden")

    def texts(self, role: str = "assistant") -> list[str]:
        found: list[str] = self.page.locator(f".message.{role} .body").all_inner_texts()
        return found

    def setting(self, **values: object) -> None:
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill(f"[name={name}]", str(value))
        self.page.click("dialog button")


@pytest.fixture
def page(browser, client) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    context.set_default_timeout(20_000)
    page = Page(context.new_page(), client)
    yield page
    assert page.problems == []
    context.close()


@pytest.mark.slow
def test_a_message_is_answered_and_the_history_stays(page, engine):
    page.setting(seed=3, max_tokens=25, temperature=0.8)
    page.send("Once upon a time")
    expected = engine.chat(
        [{"role": "user", "content": "Once upon a time"}], seed=3, max_tokens=25, temperature=0.8
    )
    (answer,) = page.texts()
    assert answer.split() == "".join(expected).split()
    assert page.texts("user") == ["Once upon a time"]
    note = page.page.locator(".message.assistant .tools").inner_text()
    assert re.search(r"25 tokens, [\d.]+ tok/s", note)
    assert page.page.locator("#strip span").count() == engine.config.n_layers
    assert re.fullmatch(r"[\d.]+ %", page.page.locator("#share").inner_text())
    page.page.reload()
    page.page.locator(".message.assistant").wait_for()
    assert page.texts() == [answer]
    page.send("And then?")
    assert len(page.texts()) == 2
    page.page.click("#new")
    assert page.texts() == []
    page.page.locator("#conversations button", has_text="Once upon a time").click()
    assert len(page.texts()) == 2


@pytest.mark.slow
def test_a_long_answer_streams_and_can_be_stopped(page):
    page.setting(max_tokens=400)
    page.page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(
            post_data=json.dumps({**route.request.post_data_json, "logit_bias": {"2": -100}})
        ),
    )
    slow = page.client.service.model.loop._worker._steps
    step = slow.step
    slow.step = lambda: (page.client.service and __import__("time").sleep(0.03), step())
    try:
        page.send("Once upon a time", waits=False)
        body = page.page.locator(".message.assistant .body")
        body.filter(has_text=re.compile("[a-z]{2}")).wait_for()
        first = body.inner_text()
        page.page.locator("#status", has_text="tok/s").wait_for()
        assert page.page.locator("#send").is_hidden()
        page.page.keyboard.press("Escape")
        page.page.locator("#stop").wait_for(state="hidden")
    finally:
        slow.step = step
    (text,) = page.texts()
    assert text.startswith(first[:2])
    assert "stopped" in page.page.locator(".message.assistant .tools").inner_text()
    page.client.wait_until_idle(5)
    assert page.page.evaluate("() => document.activeElement.id") == "input"


@pytest.mark.slow
def test_answers_are_regenerated_and_messages_edited(page):
    page.setting(max_tokens=10, temperature=1.5)
    page.send("A dog")
    (before,) = page.texts()
    for _ in range(5):
        page.page.click("text=Regenerate")
        page.page.locator("#stop").wait_for(state="hidden")
        if page.texts() != [before]:
            break
    assert page.texts() != [before]
    page.send("More")
    page.page.locator(".message.user").first.get_by_text("Edit").click()
    area = page.page.locator(".message textarea")
    assert area.input_value() == "A dog"
    area.fill("A cat")
    area.press("Enter")
    page.page.locator("#stop").wait_for(state="hidden")
    assert page.texts("user") == ["A cat"]
    assert len(page.texts()) == 1


HOSTILE = """# Title <img src=x onerror="window.hacked=1">
<script>window.hacked = 1</script>
[click](javascript:window.hacked=1) [data](data:text/html,<script>window.hacked=1</script>)
![image](https://evil.example/x.png) [good](https://example.org/?a=1&b=2)
`<b>code</b>` **bold *both* text** <iframe src="https://evil.example"></iframe>

```html
<script>window.hacked = 1</script>
```
1. first
2. second <style>body { display: none }</style>
> quoted <a href="javascript:window.hacked=1">link</a>
"""


@pytest.mark.slow
def test_what_a_model_writes_is_inert(page):
    chunk = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    requests: list[str] = []
    page.page.on("request", lambda request: requests.append(request.url))
    page.send("Hello <b>you</b> <script>window.hacked = 1</script>")
    body = page.page.locator(".message.assistant .body")
    for name in ("script", "img", "iframe", "style"):
        assert body.locator(name).count() == 0, name
    assert page.page.evaluate("() => window.hacked") is None
    assert body.locator("h2").inner_text().startswith("Title <img")
    assert body.locator("pre code").inner_text() == "<script>window.hacked = 1</script>"
    assert body.locator("ol li").count() == 2
    assert body.locator("strong em").inner_text() == "both"
    links = body.locator("a").evaluate_all("all => all.map(a => [a.href, a.rel])")
    good = ["https://example.org/?a=1&b=2", "noopener noreferrer"]
    assert links == [["https://evil.example/x.png", "noopener noreferrer"], good]
    assert page.texts("user") == ["Hello <b>you</b> <script>window.hacked = 1</script>"]
    assert not [url for url in requests if not url.startswith("http://127.0.0.1")]


@pytest.mark.slow
def test_errors_are_shown_where_the_answer_would_be(page):
    page.send("word " * 700)
    message = page.page.locator(".message.assistant .error").inner_text()
    assert re.search(r"the prompt has \d+ tokens, the context holds 512", message)
    page.problems.clear()  # the browser itself logs the status 400


@pytest.mark.slow
def test_a_phone_and_the_dark(browser, client):
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark")
    page = Page(context.new_page(), client)
    width = page.page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 360
    background = page.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 60
    assert page.page.locator("aside").is_hidden()
    page.page.click("#menu")
    assert page.page.locator("aside").is_visible()
    page.page.click("#new")
    page.page.click("#theme")
    background = page.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert min(map(int, re.findall(r"\d+", background))) > 200
    assert page.problems == []
    context.close()


@pytest.mark.slow
def test_a_key_is_entered_in_the_settings(browser, engine):
    with serving(engine, api_keys=("sk-1",)) as client:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{client.port}/")
        page.locator("#facts", has_text="API key").wait_for()
        page.click("#open-settings")
        page.fill("#key", "sk-1")
        page.click("dialog button")
        page.locator("#model", has_text="stories").wait_for()
        page.fill("#input", "Once")
        page.press("#input", "Enter")
        page.locator(".message.assistant .tools output", has_text="tok/s").wait_for()
        context.close()


@pytest.mark.slow
def test_the_bundled_model_goes_on_writing_a_story(browser):
    with hybrid.load("stories", threads=1) as engine, serving(engine) as client:
        context = browser.new_context()
        page = Page(context.new_page(), client)
        page.page.locator(".empty", has_text="beginning of a story").wait_for()
        page.setting(seed=1, max_tokens=30)
        page.send("Once upon a time, there was a")
        expected = "".join(engine.generate("Once upon a time, there was a", seed=1, max_tokens=30))
        assert page.texts()[0].split() == expected.split()
        page.send("")
        assert len(page.texts()) == 2
        assert page.problems == []
        context.close()
