"""The llm command line tool, with the server as one of its own models."""
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def llm(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("llm")
    (home / "extra-openai-models.yaml").write_text(f"- model_id: sfumato\n  model_name: tiny\n  api_base: {server.url}/v1\n"
                                                   f"  api_key_name: none\n- model_id: sfumato-text\n  model_name: tiny\n"
                                                   f"  api_base: {server.url}/v1\n  api_key_name: none\n  completion: true\n")

    def run(*args):
        command = [pathlib.Path(sys.executable).parent / "llm", *args]
        return subprocess.run(command, env={**os.environ, "LLM_USER_PATH": str(home), "OPENAI_API_KEY": "none"}, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    return run


@pytest.mark.parametrize("more", [(), ("--no-stream",)])
def test_prompt(llm, question, more):
    done = llm("prompt", "-m", "sfumato", "--key", "none", "-o", "seed", "7", *more, question)
    assert done.returncode == 0 and "10" in done.stdout, done.stderr
    assert "8+4" not in done.stdout  # the thinking is not part of the answer


def test_conversation(llm, question):
    done = llm("prompt", "-m", "sfumato", "--key", "none", "-c", "-o", "max_tokens", "30", "2+2")
    assert done.returncode == 0, done.stderr


def test_text(llm):
    done = llm("prompt", "-m", "sfumato-text", "--key", "none", "-o", "max_tokens", "4", "8+4=")
    assert done.returncode == 0 and done.stdout, done.stderr


def test_refusal(llm, question):
    done = llm("prompt", "-m", "sfumato", "--key", "none", "-o", "presence_penalty", "2", "-o", "max_tokens", "5000", question)
    assert done.returncode != 0 and "maximum context length is 1024" in done.stderr
