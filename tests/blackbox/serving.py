"""Starts `sfumato serve` the way an operator does, and stops it. Standard library only.

    with Server("--max-num-seqs", "4", ranks=2) as server:
        server.get("/health")                    -> (200, {"status": "ok"})
        server.post("/tokenize", {"prompt": "a"})
        server.log()                             what it has said so far

The server says where it listens in its ready line ("serving tiny at http://127.0.0.1:41234, grpc://…").
"""
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from places import BINARY, MPI, TINY


class Server:
    def __init__(self, *flags, ranks=1, env=None, model=TINY, patience=120):
        self.ranks, self.patience = ranks, patience
        self.file = tempfile.NamedTemporaryFile(prefix="serve-", suffix=".log")
        command = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
        command += [str(BINARY), "serve", "--model", str(model), "--port", "0", "--grpc-port", "0", *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.file, stderr=self.file,
                                        env={**os.environ, **MPI, **(env or {})})
        where = self._wait_for(r"serving .* at (http://[^\s,]+)(?:, grpc://([^\s,]+))?")
        self.url, self.grpc = where[1], where[2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def _wait_for(self, pattern):
        end = time.monotonic() + self.patience
        while not (found := re.search(pattern, self.log())):
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"the server never said {pattern!r}:\n{self.log()}")
            time.sleep(0.05)
        return found

    def log(self):
        return pathlib.Path(self.file.name).read_text(encoding="utf-8", errors="replace")

    def stop(self, patience=60):
        """Drains it; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def open(self, path, body=None, headers=None, method=None, timeout=60):
        """The response object: status, headers, read(). A refusal is a response as well."""
        data = None if body is None else json.dumps(body).encode()
        given = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, given, method=method), timeout=timeout)
        except urllib.error.HTTPError as response:
            return response

    def get(self, path, **more):
        with self.open(path, **more) as response:
            return response.status, json.loads(response.read())

    def post(self, path, body, **more):
        with self.open(path, body, **more) as response:
            return response.status, json.loads(response.read())

    def stream(self, path, body, **more):
        """The JSON of every event; the last is None for [DONE]."""
        with self.open(path, {**body, "stream": True}, **more) as response:
            for line in response:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    yield None if data == b"[DONE]" else json.loads(data)
