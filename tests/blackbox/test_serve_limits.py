"""Limits of serving.md §6, each at the limit and one past it: what is taken, and the status that says no.

Limits of single fields are in test_serve_contract.py, the queue and slow readers in test_serve_load.py, those of HTTP/2
frames, streams and idle connections in k_h2.c.
"""
import contextlib
import json
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import launch
from served import BothServer, Server, raw_socket

TEXT = "/v1/completions"
BODY, SEQUENCES, QUEUED = 70_000, 2, 3


@pytest.fixture(scope="module")
def server():
    limits = ("--max-body-bytes", BODY, "--max-num-seqs", SEQUENCES, "--max-num-queued-reqs", QUEUED, "--max-connections", "20")
    with BothServer(*limits) as running:
        yield running


def padded(size):
    """A request of that many bytes."""
    text = b'{"prompt":"x","max_tokens":1}'
    return text[:-1] + b" " * (size - len(text)) + b"}"


def answer(server, request):
    """The status of what comes back; None: closed without a word."""
    with raw_socket(server) as s:
        try:
            s.sendall(request)
        except OSError:
            pass  # it was refused while it was sent
        try:
            found = re.match(rb"HTTP/1.1 (\d+) ", s.makefile("rb").readline())
        except ConnectionResetError:
            return None
        return found and int(found[1])


def head(path=TEXT, **headers):
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{lines}\r\n".encode()


def test_body(server):
    for size, status in ((BODY, 200), (BODY + 1, 413)):
        assert answer(server, head(Content_Length=size) + padded(size)) == status
        half = padded(size)[: size // 2], padded(size)[size // 2 :]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(h), h) for h in half) + b"0\r\n\r\n"
        assert answer(server, head(Transfer_Encoding="chunked") + chunks) == status
    assert answer(server, head(Content_Length=2**63)) in (400, 413)
    assert server.get("/health")[0] == 200


def test_body_by_default():
    """8 MiB; more is refused from its length alone, before any of it has come."""
    with Server(ranks=0) as server:
        assert answer(server, head(Content_Length=8 << 20) + padded(8 << 20)) == 200
        assert answer(server, head(Content_Length=(8 << 20) + 1)) == 413


def test_headers(server):
    """64 KiB: the lines up to the empty one, without their ends."""
    def request(size):
        lines = [b"GET /health HTTP/1.1", b"Host: localhost", b"A: "]
        return b"\r\n".join([*lines[:2], lines[2] + b"a" * (size - sum(map(len, lines)))]) + b"\r\n\r\n"

    assert answer(server, request(65536)) == 200
    assert answer(server, request(65537)) == 400
    many = b"".join(b"A%d: b\r\n" % i for i in range(10_000))
    assert answer(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n") == 400


def test_depth_of_json(server):
    """2048 levels, the object itself among them."""
    for depth, status in ((2047, 200), (2048, 400)):
        text = b'{"prompt":"x","max_tokens":1,"metadata":' + b"[" * depth + b"]" * depth + b"}"
        assert answer(server, head(Content_Length=len(text)) + text) == status


def test_sequences(server):
    """More than the server can ever hold is the caller's mistake; just as many is not."""
    most = SEQUENCES + QUEUED
    assert len(server.complete("x", n=most, max_tokens=1)["choices"]) == most
    assert len(server.complete(["x"] * most, max_tokens=1)["choices"]) == most
    for fields, param in (({"prompt": "x", "n": most + 1}, "n"), ({"prompt": ["x"] * (most + 1)}, "prompt"),
                          ({"prompt": ["x"] * 2, "n": 3}, "prompt"), ({"prompt": "x", "n": most, "echo": True, "logprobs": 1}, "n")):
        status, refusal = server.post(TEXT, {**fields, "max_tokens": 1})
        assert status == 400 and refusal["error"]["param"] == param and refusal["error"]["code"] is None, refusal
        assert f"at most {most}" in refusal["error"]["message"]
    server.settle()


def test_message_of_grpc(server):
    grpc = pytest.importorskip("grpc")
    with grpc.insecure_channel(server.grpc, options=(("grpc.max_send_message_length", -1),)) as channel:
        tokenize = channel.unary_unary("/sfumato.v1.Inference/Tokenize")

        def send(size):
            """TokenizeRequest{prompt}, and an unknown field 1000 as large as it takes."""
            text = b"\x0a\x01x"
            rest = size - len(text) - 2 - 3  # its tag and its length
            length = bytes([rest & 127 | 128, rest >> 7 & 127 | 128, rest >> 14])
            return tokenize(text + b"\xc2\x3e" + length + b"\0" * rest)

        assert len(send(BODY)) > 0
        with pytest.raises(grpc.RpcError) as refusal:
            send(BODY + 1)
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"has {BODY + 1} bytes, at most {BODY}" in refusal.value.details()


def flood(s, most=64 << 20):
    """Bytes that the server and the system took before they took no more for a second, or closed."""
    sent = 0
    s.settimeout(1)
    with contextlib.suppress(OSError):
        while sent < most:
            sent += s.send(b"a" * 65536)
    return sent


def test_a_chunk_size_without_end(server):
    """The line with a chunk's size is no body yet: it has the limit of one."""
    with raw_socket(server) as s:
        s.sendall(head(Transfer_Encoding="chunked"))
        assert flood(s) < 32 << 20  # the buffers of two sockets
    assert server.get("/health")[0] == 200


def test_sending_ahead(server):
    """Who does not wait for an answer is not read for ever; the request ends with the connection."""
    before = server.metric('request_success_total{finished_reason="abort"}')
    body = json.dumps({"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 2}).encode()
    with raw_socket(server) as s:
        s.sendall(head(Content_Length=len(body)) + body)
        assert flood(s) < 32 << 20
    server.settle()
    assert server.metric('request_success_total{finished_reason="abort"}') == before + 2


def test_a_burst_of_connections():
    """However many come at once: no more than the limit, and 64 that are told so, hold descriptors."""
    with Server("--max-connections", "10", ranks=0) as server:
        def descriptors():
            return len(os.listdir(f"/proc/{server.process.pid}/fd"))

        before, sockets = descriptors(), []
        for _ in range(3):
            sockets += [raw_socket(server) for _ in range(300)]
            time.sleep(1.5)
            assert descriptors() <= before + 10 + 64
            for s in sockets[:50]:
                s.close()
            del sockets[:50]
        for s in sockets:
            s.close()
        end = time.monotonic() + 30
        while server.get("/health")[0] != 200 and time.monotonic() < end:
            time.sleep(0.2)  # those that were closed while they waited to be accepted
        assert server.get("/health")[0] == 200 and descriptors() <= before + 2


def drip(server, request, seconds):
    """Sends a byte every 0.1 s: how long the server put up with it; None: until the end."""
    begin = time.monotonic()
    with raw_socket(server) as s:
        for byte in request:
            if time.monotonic() - begin > seconds:
                return None
            try:
                s.sendall(bytes([byte]))
            except OSError:
                return time.monotonic() - begin
            time.sleep(0.1)
    raise AssertionError("the request was too short")


def test_time_to_receive():
    """Not only a pause: a request that comes a byte at a time. Others on the same server are not touched."""
    with Server("--receive-timeout", "2", ranks=0) as server, ThreadPoolExecutor() as pool:
        slow = [
            pool.submit(drip, server, head(Content_Length=5000) + padded(5000), 15),
            pool.submit(drip, server, head(X_Long="x" * 5000), 15),
        ]
        kept = server.connect()
        events = server.stream(TEXT, {"prompt": "1, 2,", "max_tokens": 900, "ignore_eos": True})
        assert events[-1] == "[DONE]" and len(events) > 100
        begin = time.monotonic()
        while time.monotonic() - begin < 5:  # longer than the limit, but each request is a whole one
            kept.request("POST", TEXT, padded(100), {"Content-Type": "application/json"})
            assert kept.getresponse().read()
            time.sleep(0.5)
        kept.close()
        lived = [f.result() for f in slow]
        assert all(t and 1.5 < t < 12 for t in lived), lived
        assert drip(server, head(X_Long="x" * 100), 1) is None


def test_connections_of_grpc(server):
    """Those beyond are closed; when others have gone there is room again."""
    host, port = server.grpc.split(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"

    def connect():
        s = socket.create_connection((host, int(port)), timeout=10)
        s.sendall(preface)
        return s

    def is_open(s):
        try:
            return s.recv(9)[3:4] == b"\4"  # SETTINGS
        except ConnectionResetError:
            return False

    time.sleep(0.2)  # the channel of the test before has left
    held = [connect() for _ in range(20)]
    assert all(map(is_open, held))
    with connect() as s:
        assert not is_open(s)
    held.pop().close()
    time.sleep(0.2)
    held.append(connect())
    assert is_open(held[-1])
    for s in held:
        s.close()


def test_queued_tokens():
    """--max-num-queued-tokens: prompts that have not begun. One alone may be larger; running ones do not count."""
    slow = {"SFUMATO_FAULT": "delay:0:100"}
    flags = ("--max-num-seqs", "1", "--max-num-queued-reqs", "8", "--max-num-queued-tokens", "20", "--prefix-cache", "off")
    with Server(*flags, ranks=0, env=slow) as server:
        sockets = []

        def begin(tokens):
            text = json.dumps({"prompt": [5] * tokens, "max_tokens": 900, "ignore_eos": True}).encode()
            sockets.append(raw_socket(server))
            sockets[-1].sendall(head(Content_Length=len(text)) + text)

        begin(50)  # more than the limit: it would never fit otherwise
        while server.metric("num_requests_running") < 1 or server.metric("generation_tokens_total") < 1:
            time.sleep(0.02)
        begin(12)
        begin(8)
        while server.metric("num_requests_waiting") < 2:
            time.sleep(0.02)
        status, headers, body = server.call("POST", TEXT, {"prompt": [5], "max_tokens": 1})
        refusal = json.loads(body)["error"]
        assert status == 503 and refusal["type"] == "overloaded_error" and refusal["code"] == "server_overloaded"
        assert "20 prompt tokens are waiting, at most 20" in refusal["message"] and int(headers["retry-after"]) >= 1
        assert server.metric('admission_rejections_total{reason="tokens"}') == 1
        sockets.pop().close()  # the 8
        while server.metric("num_requests_waiting") > 1:
            time.sleep(0.02)
        begin(8)
        while server.metric("num_requests_waiting") < 2:
            time.sleep(0.02)
        for s in sockets:
            s.close()
        server.settle()


@pytest.mark.parametrize("flag,bad", [("--stream-buffer", 4095), ("--stream-buffer", 2**30 + 1), ("--max-connections", 0),
                                      ("--max-num-seqs", 0), ("--max-num-queued-reqs", -1), ("--max-num-queued-tokens", -1),
                                      ("--max-body-bytes", 0), ("--request-timeout", -1), ("--overload-status", 500)])
def test_flags(flag, bad):
    result = launch("serve", "--port", "0", flag, str(bad))
    assert result.status == 2 and flag in result.messages[-1], result.messages
