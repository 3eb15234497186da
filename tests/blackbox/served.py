"""A running `sfumato serve` and the plainest possible client. Standard library only."""
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

from places import BINARY, MPI, TINY

# AddressSanitizer keeps freed memory for a while: its resident size says nothing
SANITIZED = b"__asan_init" in BINARY.read_bytes() if BINARY.exists() else False
READY = re.compile(r"serving .* at .*http://[^ ]*:(\d+)")


def heed_signals():
    """A shell cannot trap what was ignored before it began, as under nohup."""
    for ignored in (signal.SIGHUP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_DFL)


class Server:
    """ranks = 0: without mpirun. wrapper: a command put before everything (launch/sfumato-run)."""

    def __init__(self, *args, ranks=int(os.environ.get("SFUMATO_SERVE_RANKS", "2")), env=None, wrapper=None, wait=True, model=TINY):
        launcher = [*wrapper] if wrapper else ["mpirun", "-n", str(ranks), str(BINARY)] if ranks else [str(BINARY)]
        command = [*launcher, "serve", "--model", str(model), "--port", "0", *map(str, args)]
        environment = {**os.environ, **MPI, **(env or {})}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True,
            preexec_fn=heed_signals if wrapper else None,
        )
        self.lines, self.port, self.new = [], None, threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if wait:
            self.wait_ready()

    def _read(self):
        for raw in self.process.stderr:
            with self.new:
                self.lines.append(raw.decode(errors="replace").rstrip("\n"))
                found = READY.search(self.lines[-1])
                if found:
                    self.port = int(found[1])
                self.new.notify_all()
        with self.new:
            self.new.notify_all()

    def wait_line(self, text, timeout=30):
        with self.new:
            seen = self.new.wait_for(lambda: any(text in line for line in self.lines), timeout)
        assert seen, (text, self.lines)

    def wait_ready(self, timeout=60):
        with self.new:
            self.new.wait_for(lambda: self.port or not self.reader.is_alive(), timeout)
        assert self.port, self.lines

    @property
    def text(self):
        return "\n".join(self.lines)

    def records(self):
        """The log lines of requests."""
        return [json.loads(line.split("request ", 1)[1]) for line in self.lines if "sfumato: request {" in line]

    def ranks(self):
        """Process ids of the ranks, in order."""
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError):
                with open(f"/proc/{entry}/environ", "rb") as f:
                    environ = dict(v.split(b"=", 1) for v in f.read().split(b"\0") if b"=" in v)
                with open(f"/proc/{entry}/stat") as f:
                    parent, state = f.read().rsplit(")", 1)[1].split()[1::-1]
                with open(f"/proc/{entry}/comm") as f:
                    name = f.read().strip()
                if name != "sfumato" or state == "Z" or b"OMPI_COMM_WORLD_RANK" not in environ:
                    continue
                if self._is_below(int(entry)):
                    found[int(environ[b"OMPI_COMM_WORLD_RANK"])] = int(entry)
        return [found[r] for r in sorted(found)]

    def _is_below(self, pid):
        while pid > 1 and pid != self.process.pid:
            try:
                with open(f"/proc/{pid}/stat") as f:
                    pid = int(f.read().rsplit(")", 1)[1].split()[1])
            except OSError:
                return False
        return pid == self.process.pid

    # --- requests ---

    def connect(self, timeout=60):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def call(self, method, path, body=None, headers=None, timeout=60):
        """status, headers (lower case), bytes"""
        connection = self.connect(timeout)
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if method == "POST":
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def get(self, path, **more):
        status, _, body = self.call("GET", path, **more)
        return status, json.loads(body)

    def post(self, path, body, **more):
        status, _, answer = self.call("POST", path, body, **more)
        return status, json.loads(answer)

    def chat(self, text, **fields):
        status, answer = self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields}
        )
        assert status == 200, answer
        return answer

    def complete(self, prompt, **fields):
        status, answer = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, answer
        return answer

    def stream(self, path, body, timeout=60):
        """A list of events; the last is "[DONE]" or an error."""
        with self.open_stream(path, body, timeout) as events:
            return list(events)

    @contextlib.contextmanager
    def open_stream(self, path, body, timeout=60):
        connection = self.connect(timeout)
        try:
            connection.request(
                "POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            assert response.status == 200, (response.status, response.read())
            assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
            yield self._events(response)
        finally:
            connection.close()

    @staticmethod
    def _events(response):
        while True:
            line = response.readline()
            if not line:
                return
            if line.startswith(b"data: "):
                data = line[6:].strip()
                yield "[DONE]" if data == b"[DONE]" else json.loads(data)

    def metrics(self):
        """{name{labels}: value}; the label model_name is left out."""
        status, _, body = self.call("GET", "/metrics")
        assert status == 200
        values = {}
        for line in body.decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r',?model_name="[^"]*"', "", name).replace("{}", "")
                values[name] = float(value)
        return values

    def metric(self, name):
        return self.metrics()["sfumato:" + name]

    def steps(self):
        return self.metric('step_seconds_count{stage="forward"}')

    def settle(self, timeout=20):
        """Waits until the engine holds nothing."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            m = self.metrics()
            held = m["sfumato:num_requests_running"] + m["sfumato:num_requests_waiting"]
            if held == 0 and m['sfumato:kv_pages{state="used"}'] == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"{held} sequences, {m['sfumato:kv_pages{state=' + chr(34) + 'used' + chr(34) + '}']} pages")

    # --- for clients that bring their own HTTP ---

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc(self):
        """127.0.0.1:41235, when it was started with --grpc-port"""
        return re.search(r"grpcs?://([^\s,]+)", self.text)[1]

    def open(self, path, body=None, headers=None, method=None, timeout=60):
        """The response object of urllib: status, headers, read(). A refusal is a response as well."""
        data = None if body is None else json.dumps(body).encode()
        given = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, given, method=method), timeout=timeout)
        except urllib.error.HTTPError as response:
            return response

    # --- the end ---

    def wait(self, timeout=30):
        status = self.process.wait(timeout)
        self.reader.join(5)
        return status

    def stop(self):
        """Drains; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self):
        for pid in self.ranks():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None and self.process.poll() is None:
            assert self.stop() == 0, self.lines
        else:
            self.kill()


class BothServer(Server):
    """Both protocols, without mpirun unless ranks are asked for."""

    def __init__(self, *flags, ranks=0, **more):
        super().__init__("--grpc-port", "0", *flags, ranks=ranks, **more)


class Background(threading.Thread):
    """A call whose answer can be looked at later."""

    def __init__(self, function, *args, **more):
        super().__init__(daemon=True)
        self.work, self.answer = lambda: function(*args, **more), None
        self.start()

    def run(self):
        self.answer = self.work()


def joined(events, member="content", index=0):
    """The text of one choice of a chat stream."""
    return "".join(
        c["delta"].get(member) or ""
        for e in events
        if isinstance(e, dict)
        for c in e.get("choices", [])
        if c["index"] == index
    )


def raw_socket(server):
    s = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    return s
