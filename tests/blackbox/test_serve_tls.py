"""TLS on both listeners, with certificates made here; and every way in which the two files can be wrong."""
import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import time

import pytest
from conftest import chat, launch
from places import BINARY
from served import Server

HELP = subprocess.run([str(BINARY), "serve", "--help"], capture_output=True, text=True).stdout
BUILT = "PEM certificate" in HELP and "not built" not in HELP.split("--ssl-certfile")[-1].split("--ssl-keyfile")[0]
OPENSSL = shutil.which("openssl")
needs_tls = pytest.mark.skipif(not (BUILT and OPENSSL), reason="no TLS in this build, or no openssl to make certificates")


def make(folder, name, *more):
    """A certificate for localhost, signed by itself, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
               "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command, *(more or ["-nodes"])], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    return make(folder, "one"), make(folder, "two"), make(folder, "locked", "-passout", "pass:secret"), folder


class SecureServer(Server):
    def __init__(self, certificate, key, *args, **more):
        self.context = ssl.create_default_context(cafile=str(certificate))
        super().__init__("--ssl-certfile", certificate, "--ssl-keyfile", key, *args, wait=False, **more)
        self.wait_line("serving")
        line = next(l for l in self.lines if "serving" in l)
        self.port = int(re.search(r"https://127.0.0.1:(\d+)", line)[1])

    def connect(self, timeout=60):
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=self.context)


@pytest.fixture(scope="module")
def server(files):
    if not (BUILT and OPENSSL):
        pytest.skip("no TLS in this build, or no openssl to make certificates")
    with SecureServer(*files[0], "--grpc-port", "0", "--stream-buffer", "4096", ranks=0) as running:
        yield running


def test_http(server):
    body = chat("Tom has 3 pens. Tom buys 4 more. How many pens?", seed=1, max_tokens=60)
    status, whole = server.post("/v1/chat/completions", body)
    assert status == 200
    events = server.stream("/v1/chat/completions", body)
    assert events[-1] == "[DONE]"
    text = "".join(c["delta"].get("reasoning", "") for e in events[:-1] for c in e["choices"])
    assert text == whole["choices"][0]["message"]["reasoning"]
    many = server.stream("/v1/completions", {"prompt": "1, 2,", "max_tokens": 900, "ignore_eos": True})
    assert many[-1] == "[DONE]" and len(many) > 700
    large = server.call("POST", "/tokenize", {"prompt": "ab " * 300_000})  # more than one record, both ways
    assert large[0] == 200 and json.loads(large[2])["count"] > 300_000
    assert server.call("HEAD", "/health")[0] == 200
    connection = server.connect()
    for _ in range(3):  # kept alive
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()


def test_cancel(server):
    """Closing a TLS connection is leaving, with and without its goodbye."""
    for polite in (True, False):
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 8}),
                           {"Content-Type": "application/json"})
        if polite:
            try:
                connection.sock.unwrap()
            except (ssl.SSLError, OSError):
                pass
        connection.sock.close()
        server.settle()


def test_slow_reader(server):
    connection = server.connect()
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 32, "stream": True,
                       "logprobs": 5, "soft_thinking": {"return_trace": True}}), {"Content-Type": "application/json"})
    server.wait_line('"slow_reader"', 60)
    connection.sock.close()
    server.settle()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_handshakes(server):
    """Plain text, garbage and half a handshake end one connection and nothing else."""
    for data in (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0" * 100):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
            with contextlib.suppress(OSError):  # it may be faster in closing
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                while s.recv(1000):
                    pass
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
        old.wrap_socket(s)
    assert server.get("/health")[0] == 200


def test_alpn(server):
    def chosen(port, *names):
        context = ssl.create_default_context(cafile=None)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(list(names))
        with socket.create_connection(("127.0.0.1", port), timeout=10) as s, context.wrap_socket(s) as secure:
            return secure.selected_alpn_protocol()

    grpc_port = int(server.grpc.rsplit(":", 1)[1])
    assert chosen(server.port, "h2", "http/1.1") == "http/1.1"
    assert chosen(grpc_port, "h2", "http/1.1") == "h2"
    with pytest.raises(ssl.SSLError):
        chosen(grpc_port, "http/1.1")


def test_curl(server, files):
    if not shutil.which("curl"):
        pytest.skip("no curl")
    done = subprocess.run(["curl", "-sS", "--cacert", str(files[0][0]), f"https://localhost:{server.port}/health"], capture_output=True)
    assert done.stdout == b'{"status":"ok"}', done.stderr
    wrong = subprocess.run(["curl", "-sS", "--cacert", str(files[1][0]), f"https://localhost:{server.port}/health"], capture_output=True)
    assert wrong.returncode == 60


def test_grpc(server, files):
    grpc = pytest.importorskip("grpc")
    credentials = grpc.ssl_channel_credentials(files[0][0].read_bytes())
    with grpc.secure_channel(server.grpc.replace("127.0.0.1", "localhost"), credentials) as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20) == b"\x08\x01"
        request = b"\x12\x0a\x0a\x04user\x12\x02Hi"  # TokenizeRequest{messages{role, content}}
        assert channel.unary_unary("/sfumato.v1.Inference/Tokenize")(request, timeout=20)
    with grpc.secure_channel(server.grpc, grpc.ssl_channel_credentials(files[1][0].read_bytes())) as channel:
        error = pytest.raises(grpc.RpcError, channel.unary_unary("/grpc.health.v1.Health/Check"), b"", timeout=20)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_drain(files):
    if not (BUILT and OPENSSL):
        pytest.skip("no TLS in this build")
    with SecureServer(*files[0], ranks=2) as one, one.open_stream("/v1/completions", {"prompt": "x", "max_tokens": 300, "ignore_eos": True}) as events:
        next(events)
        one.process.send_signal(10)
        assert list(events)[-1] == "[DONE]" and one.wait() == 0


@needs_tls
def test_drain_without_handshakes(files):
    """Whoever never began a handshake is not waited for (the limit for writing last answers is 7 s)."""
    with SecureServer(*files[0], "--grpc-port", "0", ranks=0) as one:
        grpc_port = int(one.grpc.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", grpc_port)):
            one.metrics()  # the loop has turned since
            begun = time.monotonic()
            assert one.stop() == 0
            assert time.monotonic() - begun < 6


@needs_tls
def test_wrong_files(files, tmp_path):
    (good, key), (_, other), (_, locked), _ = files

    def only(certificate, its_key, *words):
        given = [*(["--ssl-certfile", certificate] if certificate else []), *(["--ssl-keyfile", its_key] if its_key else [])]
        result = launch("serve", "--port", "0", "--quiet", *given, timeout=30)
        assert result.status == 2 and len(result.messages) == 1, result.err
        assert all(str(w) in result.messages[0] for w in words), result.messages

    text = tmp_path / "text"
    text.write_text("no certificate\n")
    only(good, None, "--ssl-certfile and --ssl-keyfile need each other")
    only(None, key, "--ssl-certfile and --ssl-keyfile need each other")
    only(tmp_path / "none", key, "--ssl-certfile", tmp_path / "none", "No such file")
    only(good, tmp_path / "none", "--ssl-keyfile", tmp_path / "none", "No such file")
    only(tmp_path, key, "--ssl-certfile", "no PEM certificate")
    only(text, key, "--ssl-certfile", text, "no PEM certificate")
    only(good, text, "--ssl-keyfile", text, "no PEM key")
    only(good, good, "--ssl-keyfile", "no PEM key")
    only(good, locked, "--ssl-keyfile", "without a password")
    only(good, other, "--ssl-keyfile", other, "not the key of", good)


@pytest.mark.skipif(BUILT, reason="this build has TLS")
def test_not_built():
    result = launch("serve", "--port", "0", "--ssl-certfile", "x")
    assert result.status == 2 and "not built into this binary" in result.messages[0]
