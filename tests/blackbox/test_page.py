"""The page at "/" in a headless Chromium, at a desktop's width and at 400 px, in light and dark.

Every test ends with an empty console: no script error, nothing refused by the page's own security policy, no
request to anyone but the server. SFUMATO_SCREENSHOTS=FOLDER keeps pictures to look at.
"""
import base64
import hashlib
import json
import os
import re

import pytest

from browser import Browser, find
from conftest import SOURCE, generate
from served import BothServer as Server

pytestmark = pytest.mark.skipif(not find(), reason="no Chromium: apt-get install chromium-headless-shell")
PAGE = SOURCE / "src" / "serve" / "page.html"
QUESTION = "Tom has 8 pens. Tom buys 4 more. Then Tom loses 2 pens. How many pens does Tom have now?"
IDLE = "document.getElementById('stop').hidden && document.querySelector('.reply')"


@pytest.fixture(scope="module")
def server():
    with Server("--seed", "7") as s:
        yield s


@pytest.fixture
def page(server):
    with Browser() as b:
        b.open(server.url + "/")
        b.wait("document.getElementById('where').textContent.includes('tiny')")
        yield b
        assert b.errors == []
        assert {r for r in b.requests if not r.startswith((server.url, "blob:"))} == set()


def keep(browser, name):
    if os.environ.get("SFUMATO_SCREENSHOTS"):
        browser.picture(os.path.join(os.environ["SFUMATO_SCREENSHOTS"], name + ".png"))


def set_field(browser, name, value):
    browser.run(f"document.getElementById({name!r}).value = {value!r}")


def send(browser, text=QUESTION):
    browser.run("document.getElementById('question').focus()")
    browser.write(text)
    browser.key("Enter", text="\r")


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def test_policy_allows_exactly_the_embedded_parts(server):
    with server.open("/") as response:
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/html")
        body, policy = response.read(), response.headers["Content-Security-Policy"]
    assert body == PAGE.read_bytes()
    rules = dict((rule.split() + [""])[:2] for rule in policy.split(";") if rule.strip())
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.S)
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
    assert not re.findall(rb"""(?:src|href|action)\s*=\s*["'](?!blob:|data:image/svg)\w|@import|url\(|\sstyle=|\son\w+=["']""", body)


def test_chat_shows_thinking_and_answer(server, page):
    send(page)
    page.wait(IDLE)
    page.wait("document.querySelector('.curve .stop')")
    _, reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}],
                                                    "soft_thinking": {"return_trace": True}})
    choice = reply["choices"][0]
    steps = [r["text"] for r in choice["sfumato"]["trace"] if r["phase"] == "thinking"]
    assert texts(page, ".steps span")[:-1] == [s.lstrip(" ") or s for s in steps[:-1]]  # the last became "ended by the model"
    assert page.run("document.querySelector('.steps').textContent").startswith("".join(steps[:-1]))
    assert texts(page, ".answer") == [choice["message"]["content"]]
    assert re.fullmatch(r"Thinking: \d+ steps, \d+ soft, ended by the model", texts(page, ".thought summary")[0])
    heat = page.run("[...document.querySelectorAll('.steps span')].map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(heat)) > 2
    assert page.run("document.querySelectorAll('.curve .limit, .curve .cold').length") == 2
    keep(page, "chat")


def test_alternatives_by_keyboard_and_pointer(server, page):
    send(page)
    page.wait(IDLE)
    record = max(server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}],
                                                      "soft_thinking": {"return_trace": True}})[1]
                 ["choices"][0]["sfumato"]["trace"], key=lambda r: len(r.get("ids", [])))
    words = [server.post("/detokenize", {"tokens": [i]})[1]["prompt"].replace(" ", "␣").replace("\n", "⏎") for i in record["ids"][:12]]
    page.run("document.querySelector('.steps').focus()")
    for _ in range(record["step"] + 1):
        page.key("ArrowRight")
    page.wait("document.querySelector('#card code') && ![...document.querySelectorAll('#card code')].some(e => e.textContent === '…')")
    assert texts(page, "#card code") == words
    assert f"step {record['step']}" in texts(page, "#card")[0]
    assert page.run("document.querySelectorAll('.steps [aria-selected]').length") == 1
    keep(page, "alternatives")
    page.key("Escape")
    page.wait("document.getElementById('card').hidden")
    box = page.run("(r => [r.x + 3, r.y + 3])(document.querySelector('.steps span').getBoundingClientRect())")
    page.point(*box)
    page.wait("document.getElementById('card').textContent.startsWith('step 0')")
    curve = page.run("(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('.curve').getBoundingClientRect())")
    page.point(*curve)
    page.wait("!document.getElementById('card').textContent.startsWith('step 0')")


def test_beside_ordinary_chain_of_thought(page):
    page.run("document.getElementById('compare').click()")
    send(page)
    page.wait(IDLE)
    assert texts(page, ".reply h3") == ["Soft thinking", "Ordinary chain of thought"]
    page.wait("[...document.querySelectorAll('.thought summary')].every(e => e.textContent.includes('ended'))")
    assert [", 0 soft" in s for s in texts(page, ".thought summary")] == [False, True]
    assert all(texts(page, ".answer"))
    keep(page, "beside")


def test_cold_stop_is_marked(page):
    set_field(page, "soft_thinking.cold_stop.entropy", "20")
    set_field(page, "soft_thinking.cold_stop.length", "9")
    send(page)
    page.wait(IDLE)
    page.wait("document.querySelector('.steps .end')")
    assert texts(page, ".steps .end") == ["ended by cold stop"]
    assert texts(page, ".curve .stop-label") == ["thinking ended by cold stop"]
    assert texts(page, ".thought summary") == ["Thinking: 9 steps, 8 soft, ended by cold stop"]
    keep(page, "cold-stop")
    outside = page.run("""(() => { const box = document.querySelector('.curve').getBoundingClientRect();
        return [...document.querySelectorAll('.curve :not([hidden])')].filter(e => e.getBoundingClientRect().top < box.top - 12).length; })()""")
    assert outside == 0  # a threshold above the scale stays inside


def test_every_field_is_sent(page):
    body = page.run("""(() => {
        const values = {'soft_thinking.mode': 'gumbel', 'soft_thinking.start': 'first_token', 'soft_thinking.on_eos': 'mask',
            'soft_thinking.compat': 'none', 'soft_thinking.share_thinking': 'true', 'soft_thinking.close_text': 'So'};
        for (const e of document.querySelectorAll('#settings [id]')) if (e.id.includes('.')) e.value = values[e.id] ?? '1';
        return readSettings();
    })()""")
    answer = {"temperature": 1, "top_p": 1, "top_k": 1, "min_p": 1}
    assert body == {"soft_thinking": {
        "mode": "gumbel", "max_topk": 1, "temperature": 1, "top_p": 1, "top_k": 1, "min_p": 1, "budget": 1, "seed": 1,
        "cold_stop": {"entropy": 1, "length": 1}, "answer": answer, "gumbel_temperature": 1, "dirichlet_alpha": 1,
        "start": "first_token", "on_eos": "mask", "close_text": "So", "compat": "none", "share_thinking": True, "return_trace": 1}}


def test_stop_button(page):
    set_field(page, "soft_thinking.max_topk", "1")
    page.run("document.getElementById('cold').click()")
    set_field(page, "max_tokens", "900")
    set_field(page, "n", "4")
    send(page)
    page.wait("!document.getElementById('stop').hidden")
    page.run("document.getElementById('stop').click()")
    page.wait(IDLE)
    page.wait("![...document.querySelectorAll('.reply header')].some(e => e.textContent.includes('…'))")
    assert len(texts(page, ".reply")) == 4


def test_refusal_is_shown_and_its_field_marked(page):
    set_field(page, "soft_thinking.max_topk", "99")
    send(page)
    page.wait("document.querySelector('.problem:not([hidden])')")
    assert "soft_thinking.max_topk" in texts(page, ".problem")[0]
    assert page.run("document.querySelector('[aria-invalid]').id") == "soft_thinking.max_topk"
    page.errors = [e for e in page.errors if "400" not in e]  # the browser's own note about the status


def test_server_that_went_away():
    with Server() as gone, Browser() as b:
        b.open(gone.url + "/")
        b.wait("document.getElementById('where').textContent.includes('tiny')")
        gone.kill()
        send(b)
        b.wait("document.querySelector('.problem:not([hidden])')")
        assert texts(b, ".problem") == ["The server cannot be reached."]
        assert b.run("document.getElementById('stop').hidden")


def test_saved_trace_with_and_without_a_server(page, tmp_path):
    messages = [{"role": "user", "content": QUESTION}]
    result = generate([{"custom_id": name, "messages": messages, "soft_thinking": {"mode": name, "return_trace": True}}
                       for name in ("soft", "off")])
    path = tmp_path / "traces.jsonl"
    path.write_bytes(result.out)
    for place in ("server", "disk"):
        if place == "disk":
            page.open(PAGE.as_uri())
        page.choose_file("#file", path)
        page.wait("document.querySelector('.curve .stop')")
        assert texts(page, ".answer") == [result.lines[0]["answer"]]
        assert texts(page, ".steps span")[0] == result.lines[0]["trace"][0]["text"]
        page.run("(s => { s.value = '1'; s.dispatchEvent(new Event('change')); })(document.querySelector('article select'))")
        page.wait("document.querySelector('.thought summary').textContent.includes(', 0 soft')")
        assert texts(page, ".answer") == [result.lines[1]["answer"]]
    keep(page, "file")
    page.requests = [r for r in page.requests if r != PAGE.as_uri()]


def test_broken_files_are_refused(page, tmp_path):
    good = {"step": 0, "id": 1, "text": "a", "entropy": 0.5, "p": 0.5, "ids": [1, 2], "weights": [0.5, 0.5]}
    wrong = [{"step": "0"}, {"id": None}, {"text": 5}, {"entropy": "x"}, {"p": -1}, {"ids": [1]}, {"weights": ["a", "b"]}, {"weights": 2}]
    files = [json.dumps({"trace": [good], "answer": {"toString": 1}}), "", "{", "[]", "{}", "null", "[null]", '{"trace":5}', '{"trace":[]}', *(json.dumps([{**good, **w}]) for w in wrong)]
    for i, text in enumerate(files):
        path = tmp_path / f"{i}.json"
        path.write_text(text)
        page.choose_file("#file", path)
        page.wait(f"document.querySelectorAll('.turn .problem').length === {i + 1}")
        assert page.run("document.querySelectorAll('.turn').length") == i + 1
    assert page.run("document.querySelectorAll('.reply').length") == 0


def test_markup_from_a_file_stays_text(page, tmp_path):
    record = {"step": 0, "phase": "thinking", "id": 1, "text": "<img src=x onerror=alert(1)>", "entropy": 0.5, "p": 0.5}
    path = tmp_path / "markup.json"
    path.write_text(json.dumps({"trace": [record], "answer": "<script>alert(2)</script>", "thinking": "<b>"}))
    page.choose_file("#file", path)
    page.wait("document.querySelector('.steps span')")
    assert texts(page, ".steps span") == [record["text"]] and texts(page, ".answer") == ["<script>alert(2)</script>"]
    assert page.run("document.querySelectorAll('#log img, #log script, #log b').length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_narrow_screen(server, dark):
    with Browser(400, 800, dark=dark) as b:
        b.open(server.url + "/")
        b.wait("document.getElementById('where').textContent.includes('tiny')")
        keep(b, f"narrow-welcome-{'dark' if dark else 'light'}")
        assert b.run("document.getElementById('settings').hidden")
        b.run("document.getElementById('compare').click()")
        send(b)
        b.wait(IDLE)
        keep(b, f"narrow-{'dark' if dark else 'light'}")
        b.run("document.getElementById('toggle').click()")
        assert not b.run("document.getElementById('settings').hidden")
        keep(b, f"narrow-settings-{'dark' if dark else 'light'}")
        assert b.run("document.documentElement.scrollWidth") <= 400
        wide = b.run("[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
                     "e.getBoundingClientRect().right > 401 && !e.closest('.curve')).map(e => e.tagName + '.' + e.className)")
        assert wide == [] and b.errors == []
        assert b.run("document.getElementById('settings').contains(document.activeElement)")
        b.key("Escape")  # they lie over the chat here
        assert b.run("document.getElementById('settings').hidden && document.activeElement.id") == "toggle"


def test_keyboard_alone(page):
    """Tab reaches every control in order, and Enter works on each kind."""
    seen = []
    for _ in range(12):
        page.key("Tab")
        seen.append(page.run("document.activeElement.id || document.activeElement.tagName"))
    assert seen[:3] == ["open", "fresh", "toggle"]
    assert {"question", "compare", "memory", "send"} <= set(seen)
    names = page.run("""[...document.querySelectorAll('button, input, select, textarea')].filter(e => e.checkVisibility() &&
        !(e.getAttribute('aria-label') || e.labels?.length || e.textContent)).map(e => e.outerHTML)""")
    assert names == []


def test_key_is_kept_for_the_tab_only(tmp_path):
    with Server("--api-key", "secret") as locked, Browser() as b:
        b.open(locked.url + "/")
        b.wait("document.getElementById('where').textContent.includes('key')")
        b.run("(e => { e.value = 'secret'; e.dispatchEvent(new Event('change')); })(document.getElementById('key'))")
        b.wait("document.getElementById('where').textContent.includes('tiny')")
        send(b)
        b.wait(IDLE)
        assert all(texts(b, ".answer"))
        assert b.run("[Object.keys(sessionStorage), Object.keys(localStorage), document.cookie]") == [["key"], [], ""]
        assert all("401" in e for e in b.errors)  # the first question about the model, before there was a key
