"""R10, R6, R11: drain, stop, and the loss of the launcher, through mpirun and launch/sfumato-run."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest
from conftest import BINARY, SOURCE, TINY
from served import Server, heed_signals

LONG = {"prompt": "Tom has", "max_tokens": 400, "n": 8, "ignore_eos": True, "soft_thinking": {"mode": "off"}}
MESSAGES = "/v1/completions"


class Client(threading.Thread):
    """A stream in the background: events, and how it ended."""

    def __init__(self, server, body=LONG):
        super().__init__(daemon=True)
        self.server, self.body, self.events, self.began, self.failure = server, body, [], threading.Event(), None
        self.start()
        assert self.began.wait(20)

    def run(self):
        try:
            with self.server.open_stream(MESSAGES, self.body, timeout=60) as events:
                for event in events:
                    self.events.append(event)
                    self.began.set()
        except Exception as e:
            self.failure = e
        self.began.set()

    def last(self, timeout=100):
        self.join(timeout)
        assert not self.is_alive()
        return self.events[-1]


def gone(pids, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        left = []
        for pid in pids:
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/stat") as f:
                    if f.read().rsplit(")", 1)[1].split()[0] != "Z":
                        left.append(pid)
        if not left:
            return True
        time.sleep(0.05)
    return False


# --- R10 ---

WAYS = {
    "SIGUSR1 to mpirun": lambda s: s.process.send_signal(signal.SIGUSR1),
    "SIGUSR1 to rank 0": lambda s: os.kill(s.ranks()[0], signal.SIGUSR1),
    "SIGTERM to rank 0": lambda s: os.kill(s.ranks()[0], signal.SIGTERM),
    "SIGINT to rank 0": lambda s: os.kill(s.ranks()[0], signal.SIGINT),
    "/admin/drain": lambda s: s.post("/admin/drain", b""),
}


@pytest.mark.parametrize("way", WAYS)
def test_R10_drain(way):
    server = Server("--shutdown-timeout", "120")
    try:
        client, ranks = Client(server), server.ranks()
        WAYS[way](server)
        server.wait_line("draining")
        status, headers, body = server.call("GET", "/health")
        assert (status, json.loads(body)) == (503, {"status": "draining"})
        assert server.get("/livez")[0] == 200
        status, headers, body = server.call("POST", MESSAGES, {"prompt": "x"})
        assert status == 503 and json.loads(body)["error"]["code"] == "shutting_down"
        assert headers["connection"] == "close"
        assert client.last() == "[DONE]"
        assert server.wait() == 0, server.lines
        assert gone(ranks, 1)
    finally:
        server.kill()


def test_R10_drain_through_the_wrapper():
    wrapper = ["/bin/bash", str(SOURCE / "launch/sfumato-run"), "-n", "2"]
    for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        server = Server("--shutdown-timeout", "120", wrapper=wrapper, env={"SFUMATO": str(BINARY)})
        try:
            client, ranks = Client(server), server.ranks()
            server.process.send_signal(sent)
            assert client.last() == "[DONE]"
            assert server.wait() == 0 and gone(ranks, 1)
        finally:
            server.kill()
    server = Server(wrapper=wrapper, env={"SFUMATO": str(BINARY)})
    try:  # the second one stops
        client, ranks = Client(server, {**LONG, "n": 32, "max_tokens": 1000}), server.ranks()
        server.process.send_signal(signal.SIGTERM)
        server.wait_line("draining")
        server.process.send_signal(signal.SIGTERM)
        assert aborted(client.last()) == "shutting_down"
        assert server.wait() == 1 and gone(ranks, 3)
    finally:
        server.kill()


def aborted(event):
    return isinstance(event, dict) and event.get("error", {}).get("code")


def test_R10_second_signal_aborts():
    server = Server()
    try:
        client, ranks, began = Client(server, {**LONG, "n": 32, "max_tokens": 1000}), server.ranks(), time.monotonic()
        server.process.send_signal(signal.SIGUSR1)
        server.wait_line("draining")
        server.process.send_signal(signal.SIGUSR1)
        assert aborted(client.last()) == "shutting_down"
        assert server.wait() == 1 and gone(ranks, 1)
        assert time.monotonic() - began < 5
    finally:
        server.kill()


def test_R10_shutdown_timeout():
    server = Server("--shutdown-timeout", "0.2")
    try:
        client = Client(server, {**LONG, "n": 32, "max_tokens": 1000})
        server.process.send_signal(signal.SIGUSR1)
        assert aborted(client.last()) == "shutting_down"
        assert server.wait() == 1
    finally:
        server.kill()


def test_R10_stop_of_mpirun():
    """mpirun kills its ranks within two seconds of a SIGTERM: every stream ends with an error event."""
    server = Server("--max-num-seqs", "96")
    try:
        clients, ranks = [Client(server, {**LONG, "n": 30}) for _ in range(3)], server.ranks()
        follower = ranks[1]
        os.kill(follower, signal.SIGSTOP)  # so that nothing ends by itself; mpirun wakes it
        server.process.terminate()
        for client in clients:
            assert aborted(client.last()) == "shutting_down"
        assert server.wait() == 1 and gone(ranks, 3)
    finally:
        server.kill()


# --- launch/sfumato-run ---

WRAPPER = ["/bin/bash", str(SOURCE / "launch/sfumato-run")]


@pytest.fixture
def fake(tmp_path):
    """A function that runs the wrapper over an mpirun that is this Python script."""

    def start(script, *args, stdin=subprocess.DEVNULL, **more):
        (tmp_path / "mpirun").write_text(f"#!/usr/bin/python3\nimport os, signal, sys, time\n{script}\n")
        (tmp_path / "mpirun").chmod(0o755)
        plain = {k: v for k, v in os.environ.items() if not k.startswith("SFUMATO_")}
        environment = {**plain, "SFUMATO": "/bin/echo", "PATH": f"{tmp_path}:{os.environ['PATH']}", **more}
        return subprocess.Popen([*WRAPPER, *args], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=environment, text=True, preexec_fn=heed_signals)

    return start


def test_wrapper_passes_standard_input_on():
    lines = b"".join(json.dumps({"prompt": [i], "max_tokens": 1, "custom_id": i}).encode() + b"\n" for i in range(3))
    done = subprocess.run([*WRAPPER, "-n", "2", "generate", "--quiet", "--model", str(TINY), "--input", "-"], input=lines, capture_output=True,
                          env={**os.environ, "SFUMATO": str(BINARY)}, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("given, passed", [
    (["serve", "--port", "1"], "-n 2 /bin/echo serve --port 1"),
    (["-n", "4", "--hostfile", "x", "--", "serve"], "-n 4 --hostfile x /bin/echo serve"),
    (["generate", "-p", "a", "--", "b"], "-n 2 /bin/echo generate -p a -- b"),
    (["--", "--help"], "-n 2 /bin/echo --help"),
])
def test_wrapper_tells_options_apart(fake, given, passed):
    assert fake("print(*sys.argv[1:])", *given).communicate(timeout=10)[0].strip() == passed


def test_wrapper_refuses_a_program_that_cannot_run(fake):
    job = fake("print('started')", "serve", SFUMATO="/nonexistent/sfumato")
    out, err = job.communicate(timeout=10)
    assert job.returncode == 2 and out == "" and "SFUMATO=/nonexistent/sfumato" in err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_wrapper_signals(fake, sent):
    """The first drains, the second stops, and the status is mpirun's."""
    job = fake("signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'drain\\n'))\n"
               "signal.signal(signal.SIGTERM, lambda *_: os._exit(5))\n"
               "os.write(1, b'ready\\n')\ntime.sleep(20)", "serve")
    for said in ("ready", "drain"):
        assert job.stdout.readline().strip() == said
        job.send_signal(sent)
    assert job.wait(10) == 5


def test_wrapper_signal_as_mpirun_ends(fake):
    """Whose status is its own, whatever the shell makes of the two at once."""
    script = "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\nprint('ready', flush=True)\nsys.stdin.read()\nos._exit(7)"
    for _ in range(20):
        job = fake(script, "serve", stdin=subprocess.PIPE)
        job.stdout.readline()
        job.stdin.close()
        time.sleep(0.002)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(10) == 7


# --- R11 ---


def test_R11_launcher_killed():
    server = Server()
    try:
        client, ranks = Client(server, {**LONG, "n": 32, "max_tokens": 1000}), server.ranks()
        server.process.kill()
        assert gone(ranks, 3)
        assert aborted(client.last()) == "shutting_down"
    finally:
        server.kill()


@pytest.mark.parametrize("phase, slow", [("init", 0), ("init", 1), ("load", 0), ("load", 1)])
def test_R11_launcher_killed_before_ready(phase, slow):
    server, ranks = Server(wait=False, env={"SFUMATO_FAULT": f"{phase}-delay:{slow}:60000"}), []
    try:
        if phase == "load":
            server.wait_line("compute backend")
        while len(ranks) < 2:
            time.sleep(0.5)
            ranks = server.ranks()
        server.process.kill()
        assert gone(ranks, 2)
    finally:
        for pid in ranks:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        server.kill()


# --- R6 ---


def test_R6_a_signal_before_ready_leaves_nothing():
    for sent in (signal.SIGUSR1, signal.SIGTERM):
        server = Server(wait=False)
        try:
            server.wait_line("start-up", 20)
            ranks = server.ranks()
            server.process.send_signal(sent)
            status = server.wait(10)
            assert status != 0 or any("serving" in line for line in server.lines)  # or it was ready already
            assert gone(ranks, 3)
        finally:
            server.kill()
