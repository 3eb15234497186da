"""A minute of bench/soak (issue: an hour of mixed load shows flat memory): R7, R9, R12 under everything at once.

The hour itself is run by hand, with its figures in bench/results/; here the bound of memory is looser, as a minute is
mostly warming up. Statuses, shapes, equality by seed, pages and the drain are judged as in the hour. A sanitized
server gets less time, and what it finds counts, not its memory. A minute is also the limit of idle connections: some
are held to a second server meanwhile.
"""
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from places import BUILD, SOURCE
from served import SANITIZED, BothServer

IDLE = 60  # seconds, serving.md §6


class Watched(threading.Thread):
    """A connection that says this and then nothing: how long it lasts, and what comes."""

    def __init__(self, port, said):
        super().__init__(daemon=True)
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=2 * IDLE)
        self.socket.sendall(said)
        self.begin, self.seconds, self.last, self.bytes = time.monotonic(), None, 0, b""
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while piece := self.socket.recv(65536):
                self.last, self.bytes = time.monotonic() - self.begin, self.bytes + piece
            self.seconds = time.monotonic() - self.begin


@pytest.fixture
def idle():
    """Connections that end after the idle limit, and a stream that goes on, however long its client is silent."""
    with BothServer("--shutdown-timeout", "0.1", env={"SFUMATO_FAULT": "delay:0:250"}) as server:
        body = b'{"prompt":"x","max_tokens":1000,"ignore_eos":true,"stream":true}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        grpc = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
        stream = Watched(server.port, head + body)
        ends = [Watched(server.port, said) for said in (b"", b"GET /hea", head + body[:20], b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")]
        ends.append(Watched(int(server.grpc.rsplit(":", 1)[1]), grpc))
        yield
        for one in ends:
            one.join(max(0, IDLE + 15 + one.begin - time.monotonic()))
        assert all(one.seconds and IDLE - 2 < one.seconds < IDLE + 15 for one in ends), [one.seconds for one in ends]
        assert b" 200 OK" in ends[3].bytes
        assert stream.seconds is None and stream.last > IDLE and stream.bytes.count(b"data: ") > 100
        stream.socket.shutdown(socket.SHUT_RDWR)
        server.settle()


def test_R7_R9_R12_a_minute_of_mixed_load(idle, tmp_path):
    report = tmp_path / "soak.json"
    much = ["--seconds", "30", "--rate", "4", "--growth-mb", "1e6", "--no-deep"] if SANITIZED else \
        ["--seconds", "60", "--rate", "8", "--growth-mb", "8"]
    done = subprocess.run(
        [sys.executable, str(SOURCE / "bench" / "soak"), "--build", str(BUILD), *much, "--warm-up", "10", "--every", "2",
         "--report", str(report)],
        capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["passed"] and found["problem_count"] == 0 and found["pages_used_at_end"] == 0
    assert found["requests"] > 60 and found["statuses"]["200"] > 60
    assert not [s for s in found["statuses"] if s.startswith("5")]
