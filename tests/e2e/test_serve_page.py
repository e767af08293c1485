"""The page of `ee-scale serve`, in a headless Chromium where there is one (CHROMIUM names it, or playwright has it)."""

import httpx
import pytest
from helpers.server import EXITS, LAYERS, serving, write_served_model


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    from draw_page import open_browser

    with playwright.sync_playwright() as started:
        try:
            found = open_browser(started)
        except playwright.Error as error:
            pytest.skip(f"no Chromium ({str(error).splitlines()[0]})")
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    model = write_served_model(tmp_path_factory.mktemp("served"))
    settings = ["name=tiny", "policies=[threshold,fixed]", "audit=1", "follow=0.9"]
    with serving(model, tmp_path_factory.mktemp("server"), *settings) as found:
        yield found


def test_a_chat_in_a_browser(server, browser):
    """Text, colours and numbers are those of the answer; nothing of it is taken for HTML; no word of the browser's."""
    page, words, asked = browser.new_page(), [], []
    page.set_default_timeout(0)
    page.on("console", lambda message: words.append(message.text))
    page.on("pageerror", lambda error: words.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#shares tr")
    assert page.text_content("#title") == f"tiny: {LAYERS} layers, exits at 1, 3"
    assert page.locator("#policy option").all_text_contents() == ["off", "threshold", "fixed"]

    def until(said: str) -> None:
        while not page.evaluate(said):  # playwright's own waits are forbidden by the page's policy
            page.wait_for_timeout(20)

    def send(text: str) -> None:
        page.fill("#text", text)
        page.click("#send")

    page.select_option("#policy", "fixed")
    page.fill("#layer", "3")
    page.fill("#tokens", "9")
    question = "<img src=x onerror=alert(1)>"
    send(question)
    until("tokens.length === 9 && abort === null")
    body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "max_tokens": 9, "temperature": 0}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=body | {"exit_policy": "fixed", "exit_layer": 3}, timeout=None
    ).json()["choices"][0]
    assert page.text_content(".turn.user") == question
    assert page.text_content(".turn.assistant") == answer["message"]["content"]
    colours = {
        span.get_attribute("data-layer"): span.evaluate("span => span.style.color")
        for span in page.locator(".turn.assistant span").all()
    }
    assert colours["3"]
    assert not colours.get(str(LAYERS))
    until("document.querySelectorAll('#shares tr')[1].cells[1].textContent === '8'")
    rows = [row.split() for row in page.locator("#shares tr").all_inner_texts()]
    assert [row[:2] for row in rows] == [[str(EXITS[0]), "0"], [str(EXITS[1]), "8"], [str(LAYERS), "1"]]
    until("document.getElementById('agreement').textContent.endsWith('%')")
    assert page.text_content("#depth").endswith(f"of {LAYERS}")
    assert not words
    page.fill("#layer", "2")
    send("again")
    page.wait_for_selector(".turn.error")
    assert page.text_content(".turn.error") == "exit_layer=2: the model has exits at 1, 3"
    assert page.evaluate("turns.length") == 2
    page.fill("#layer", "3")
    page.fill("#tokens", "400")
    send("more")
    until("tokens.length > 12")
    page.click("#stop")
    until("abort === null")
    while server.metric("num_requests_running"):
        pass
    assert server.metric("request_success_total", finished_reason="abort") == 1
    assert not page.locator("#levels tr").count()  # a fixed exit has no limit that could follow
    page.select_option("#policy", "threshold")
    page.fill("#threshold", "0")
    page.fill("#tokens", "40")
    page.click("#clear")
    send("follow")
    until("abort === null && document.querySelectorAll('#levels tr').length === 1")
    known = {name: server.metric(f"exit_follow_{name}", tag="") for name in ("audited_tokens_total", "level", "state")}
    assert known["audited_tokens_total"] > 9
    compared = f"of {known['audited_tokens_total']:.0f}"
    until(f"document.querySelector('#levels').rows[0].cells[3].textContent.endsWith({compared!r})")
    state = ("usual", "raised", "off")[int(known["state"])]
    assert page.locator("#levels td").all_text_contents()[:3] == ["(none)", state, f"{known['level']:.2f}"]
    assert all(url.startswith(server.url) for url in asked)
