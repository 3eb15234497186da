"""A fuzzer over /openapi.json: no 5xx, and every reply is one that the description allows. It does not get to know the
field `model`: another name is a 404, and nothing behind it would be reached."""
import json
import pathlib
import subprocess
import sys

import httpx
import jsonschema_rs

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"

# A method that libevent does not know is its 501, the contract says so: not asked for.
CONFIG = """
[phases.coverage]
unexpected-methods = ["DELETE", "PUT", "PATCH"]
"""


def test_chunks(server):
    """Events of streams, which the fuzzer does not open, are those that the description names."""
    description = httpx.get(server.url + "/openapi.json").json()
    ask = {"stream": True, "max_tokens": 80, "seed": 1, "stream_options": {"include_usage": True}, "soft_thinking": {"return_trace": 3}}
    for path, schema, more in (("chat/completions", "ChatChunk", {"messages": [{"role": "user", "content": "1+1"}], "logprobs": True, "top_logprobs": 2}),
                               ("completions", "CompletionChunk", {"prompt": "1+1=", "logprobs": 2})):
        check = jsonschema_rs.validator_for({"$ref": "#/components/schemas/" + schema, "components": description["components"]})
        events = httpx.post(f"{server.url}/v1/{path}", json={**ask, **more}, timeout=60).text.split("\n\n")
        chunks = [json.loads(e[6:]) for e in events if e.startswith("data: {")]
        assert len(chunks) > 10
        for chunk in chunks:
            assert check.is_valid(chunk), [str(e) for e in check.iter_errors(chunk)]
        assert not check.is_valid({**chunks[0], "object": "x"}) and not check.is_valid({"error": {}})


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
