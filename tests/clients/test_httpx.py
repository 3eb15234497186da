"""Plain HTTP with httpx: the routes that are not OpenAI's, headers, methods, disconnects."""
import json
import re
import shutil
import ssl
import subprocess
import time

import httpx
import pytest


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as c:
        yield c


def test_tokenize_and_back(client):
    for text in ("Tom has 8 pens.", "", " 日本語 🦊 ", "a\nb\tc"):
        answer = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False, "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 1024
        assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_template(client, question):
    messages = [{"role": "user", "content": question}]
    prompt = client.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert question in prompt and prompt.endswith("<think>\n")
    ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert client.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False}).json()["tokens"] == ids
    usage = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(ids)


def test_health_and_livez(client):
    for path in ("/health", "/livez", "/health?deep=1"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"}), path
        assert client.head(path).status_code == 200 and client.head(path).content == b""


def test_description(client):
    description = client.get("/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/apply-template", "/health",
            "/livez", "/metrics", "/admin/drain"} <= set(description["paths"])


def test_methods_types_paths(client):
    answer = client.get("/v1/chat/completions")
    assert answer.status_code == 405 and "POST" in answer.headers["allow"]
    assert client.post("/v1/models", json={}).status_code == 405
    assert client.post("/tokenize", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post("/tokenize", content="{}", headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 400
    assert client.get("/nothing").status_code == 404
    for wrong in ("", "{", "[]", "5", '{"prompt":1}', '{"prompt":"a","prompt":"b"}', '{"prompt":"\\ud800"}'):
        answer = client.post("/tokenize", content=wrong, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and set(answer.json()["error"]) >= {"message", "type", "param", "code"}, wrong


def test_request_ids(client):
    assert client.get("/health", headers={"X-Request-Id": "a.b-c_9"}).headers["x-request-id"] == "a.b-c_9"
    for bad in ("a b", "x" * 129, "ä".encode()):
        assert re.fullmatch("[0-9a-f]{32}", client.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"])


def test_foreign_pages_are_kept_out(client):
    answer = client.options("/v1/chat/completions", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_stream_headers_and_framing(client, question):
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 30}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
        events = answer.read().decode().split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    assert all(json.loads(e.removeprefix("data: "))["object"] == "chat.completion.chunk" for e in events)


def test_keep_alive(client):
    """Many requests on one connection, refusals between them."""
    with httpx.Client(base_url=client.base_url, limits=httpx.Limits(max_connections=1)) as one:
        for i in range(200):
            assert one.post("/tokenize", json={"prompt": str(i)} if i % 3 else {}).status_code == (200 if i % 3 else 400)


def running(client):
    text = client.get("/metrics").text
    return sum(float(v) for v in re.findall(r"^sfumato:num_requests_(?:running|waiting)\{.*\} (\S+)", text, re.M))


def test_disconnects_free_everything(client, question):
    """R9, small: streams dropped at every point of a reply."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 900, "ignore_eos": True, "n": 2}
    for events in range(12):
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for _, _line in zip(range(2 * events), answer.iter_lines()):
                pass
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json={**body, "stream": False, "n": 8}, timeout=0.05)
    end = time.monotonic() + 20
    while (left := running(client)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == 0
    used = re.findall(r'^sfumato:kv_pages\{.*state="used".*\} (\S+)', client.get("/metrics").text, re.M)
    assert used and all(float(v) == 0 for v in used)


def test_drain(make_server):
    with make_server() as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/admin/drain", json={})
        assert answer.status_code == 202 and answer.json() == {"status": "draining", "in_flight": 0}
        assert server.process.wait(30) == 0


def test_tls(make_server, tmp_path):
    """Its own certificate store, HTTP/1.1 by ALPN, a stream; the wrong certificate is refused."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("no openssl to make a certificate")
    for name in ("one", "two"):
        subprocess.run([openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                        "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", tmp_path / f"{name}.pem",
                        "-keyout", tmp_path / f"{name}.key"], check=True, capture_output=True)
    server = make_server("--ssl-certfile", tmp_path / "one.pem", "--ssl-keyfile", tmp_path / "one.key", wait=False)
    with server:
        server.wait_line("serving", 60)
        port = re.search(r"https://127.0.0.1:(\d+)", server.text)[1]
        body = {"prompt": "1, 2,", "max_tokens": 20, "stream": True}
        with httpx.Client(base_url=f"https://localhost:{port}", verify=ssl.create_default_context(cafile=tmp_path / "one.pem")) as secure:
            with secure.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200 and list(response.iter_lines())[-2:] == ["data: [DONE]", ""]
            assert secure.get("/health").json() == {"status": "ok"}
        with httpx.Client(verify=ssl.create_default_context(cafile=tmp_path / "two.pem")) as other, pytest.raises(httpx.ConnectError):
            other.get(f"https://localhost:{port}/health")
