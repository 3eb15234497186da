"""A fuzzer over /openapi.json: no 5xx, and every reply is one that the description allows."""
import pathlib
import subprocess
import sys

import httpx
import pytest

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"


# A method that libevent does not know is its 501, the contract says so: not asked for.
CONFIG = """
[phases.coverage]
unexpected-methods = ["DELETE", "PUT", "PATCH"]
"""


def test_description(server, tmp_path):
    if not httpx.get(server.url + "/openapi.json").json()["paths"]:
        pytest.skip("/openapi.json describes no path")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [pathlib.Path(sys.executable).parent / "schemathesis", "--config-file", tmp_path / "schemathesis.toml", "run", server.url + "/openapi.json", "--checks", CHECKS,
               "--exclude-path", "/admin/drain", "--max-examples", "40", "--seed", "1", "--request-timeout", "30",
               "--phases", "examples,coverage,fuzzing", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
