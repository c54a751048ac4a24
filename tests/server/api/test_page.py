"""The page at `/`: what is served, and what a browser makes of it."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.api import page as page_files
from server.types import AbortReason
from tests.server.fakes import echo_engine, running_edge, served_edge, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STATIC = Path(page_files.__file__).parent / "static"


def test_served_with_strict_headers_and_refers_to_nothing_outside() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            index = await edge.http.get("/")
            assert index.status_code == 200 and index.headers["content-type"] == "text/html; charset=utf-8"
            references = re.findall(r'(?:src|href)="([^"#][^"]*)"', index.text)
            scripts = [name for name in references if name.endswith(".js")]
            assert len(references) == 4 and len(scripts) == 2, references
            answers = [index]
            for name in references:
                answers.append(await edge.http.get(f"/{name}"))
                imported = re.findall(r'from "\./([^"]+)"', answers[-1].text)
                answers += [await edge.http.get(f"/static/{file}") for file in imported]
            assert {answer.url.path.removeprefix("/static/") for answer in answers} - {"/"} == {
                file.name for file in STATIC.iterdir() if file.name != "index.html"
            }
            for answer in answers:
                assert answer.status_code == 200, answer.url
                policy = answer.headers["content-security-policy"]
                assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
                assert answer.headers["x-content-type-options"] == "nosniff"
                outside = answer.text.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
                assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r"^\s*//.*$", "", outside, flags=re.M))
            # What the policy would block.
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index.text)

    asyncio.run(check())


def test_caching_and_unknown_files() -> None:
    async def check() -> None:
        async with running_edge() as edge:
            first = await edge.http.get("/static/chat.js")
            again = await edge.http.get("/static/chat.js", headers={"If-None-Match": first.headers["etag"]})
            assert again.status_code == 304 and not again.content
            for name in ("nothing.js", "index.html", "..%2fpage.py", "%2e%2e%2fpage.py"):
                assert (await edge.http.get(f"/static/{name}")).status_code == 404
            assert not {"/", "/static/{name}"} & (await edge.http.get("/openapi.json")).json()["paths"].keys()

    asyncio.run(check())


@contextmanager
def browser_page(**context: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page of headless Chromium, and what its console complained about."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        try:
            page = browser.new_page(**context)
            page.set_default_timeout(60_000)
            complaints: list[str] = []
            page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            yield page, complaints
        finally:
            browser.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chat_in_a_browser() -> None:
    engine = echo_engine(step_seconds=0.03)
    with served_edge(engine) as (url, _), browser_page() as (page, complaints):
        requests: list[Any] = []
        page.on("request", lambda request: requests.append(request))
        page.goto(url)
        page.get_by_text("echo · 512 tokens of context").wait_for()
        page.get_by_label("System prompt").fill("be brief")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Most tokens of an answer").fill("40")
        page.get_by_label("API key").fill("secret")
        message = page.get_by_label("Message", exact=True)
        message.fill("<b>hello</b>")
        message.press("Enter")
        page.locator("article.assistant .text").get_by_text("[system] be brief").wait_for()
        page.locator(".figures").wait_for()
        assert page.locator("article.user .text").inner_text() == "<b>hello</b>"
        assert page.locator("article b").count() == 0
        [call] = [request for request in requests if request.url.endswith("/v1/chat/completions")]
        assert call.headers["authorization"] == "Bearer secret"
        body = call.post_data_json
        assert body["temperature"] == 0.5 and body["max_tokens"] == 40
        assert [entry["role"] for entry in body["messages"]] == ["system", "user"]
        assert float(page.locator("#tokens-per-second").inner_text()) >= 0
        page.locator("#ttft", has_text=re.compile(r"^\d+ ms$")).wait_for()

        # Stopped: at once at the server, and the conversation goes on from what there was.
        page.get_by_label("Most tokens of an answer").fill("")
        page.get_by_label("System prompt").fill(" ".join(map(str, range(100))))
        message.fill("go on")
        page.get_by_role("button", name="Send").click()
        page.locator("article.assistant .text", has_text="[system] 0 1").wait_for()
        assert page.locator("#running").inner_text() in ("0", "1")
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped").wait_for()
        wait_until(lambda: [reason for _, reason in engine.aborted] == [AbortReason.CLIENT])
        message.fill("and")
        message.press("Enter")
        page.locator(".figures").nth(2).wait_for()
        body = [request for request in requests if request.url.endswith("/v1/chat/completions")][-1].post_data_json
        assert [entry["role"] for entry in body["messages"]] == ["system", *["user", "assistant"] * 2, "user"]

        page.reload()
        assert page.get_by_label("API key").input_value() == "secret"
        assert all(request.url.startswith(url) for request in requests)
        assert not complaints


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_errors_colours_and_names_in_a_browser() -> None:
    with served_edge(echo_engine(), chat_template=None) as (url, _), browser_page() as (page, complaints):
        page.goto(url)
        backgrounds = set()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        message = page.get_by_label("Message", exact=True)
        message.fill("hello")
        message.press("Enter")
        page.get_by_role("alert").get_by_text("chat template").wait_for()
        assert message.input_value() == "hello" and page.locator("article").count() == 0
        unnamed = (
            "[...document.querySelectorAll('input, textarea, button')].filter(e => !e.labels.length && !e.textContent)"
        )
        assert page.evaluate(f"{unnamed}.map(e => e.id)") == []
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert all("400" in complaint for complaint in complaints)  # Chromium reports the refused request itself
