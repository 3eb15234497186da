"""A fuzzer over /openapi.json: no 5xx, and every reply is one that the description allows. It does not get to know the
field `model`: another name is a 404, and nothing behind it would be reached."""
import json
import pathlib
import subprocess
import sys

import httpx

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"

# A method that libevent does not know is its 501, the contract says so: not asked for.
CONFIG = """
[phases.coverage]
unexpected-methods = ["DELETE", "PUT", "PATCH"]
"""


def test_description(server, tmp_path):
    description = httpx.get(server.url + "/openapi.json").json()
    assert len(description["paths"]) > 10
    for name in ("ChatRequest", "CompletionRequest"):
        del description["components"]["schemas"][name]["properties"]["model"]
    (tmp_path / "openapi.json").write_text(json.dumps(description))
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [pathlib.Path(sys.executable).parent / "schemathesis", "--config-file", tmp_path / "schemathesis.toml",
               "run", tmp_path / "openapi.json", "--url", server.url, "--checks", CHECKS, "--exclude-path", "/admin/drain", "--max-examples", "40", "--seed", "1", "--request-timeout", "30",
               "--phases", "examples,coverage,fuzzing", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
