"""A server with both protocols, by address: for gRPC, a browser, and clients that bring their own HTTP."""
import json
import re
import urllib.error
import urllib.request

import served


class Server(served.Server):
    """url: "http://127.0.0.1:41234"; grpc: "127.0.0.1:41235"."""

    def __init__(self, *flags, ranks=0, **more):
        super().__init__("--grpc-port", "0", *flags, ranks=ranks, **more)
        self.url = f"http://127.0.0.1:{self.port}"
        self.grpc = re.search(r"grpc://([^\s,]+)", self.text)[1]

    def open(self, path, body=None, headers=None, method=None, timeout=60):
        """The response object of urllib: status, headers, read(). A refusal is a response as well."""
        data = None if body is None else json.dumps(body).encode()
        given = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, given, method=method), timeout=timeout)
        except urllib.error.HTTPError as response:
            return response
