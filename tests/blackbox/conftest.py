"""Runs the built program as a user does. Standard library and pytest only.

SFUMATO_BUILD_DIR and SFUMATO_SOURCE_DIR come from CTest; by hand: SFUMATO_BUILD_DIR=build pytest tests/blackbox
"""
import json
import os
import struct
import subprocess

import pytest

from places import BINARY, BUILD, MPI, SOURCE, TINY  # noqa: F401 (tests import them from here)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out of sanitizer builds (-m 'not slow')")


class Result:
    def __init__(self, done):
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def lines(self):
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.decode().splitlines()]

    @property
    def messages(self):
        """What the program itself said: mpirun's own words do not start with 'sfumato: '."""
        return [line for line in self.err.decode(errors="replace").splitlines() if line.startswith("sfumato: ")]


def launch(*args, ranks=0, stdin=b"", env=None, timeout=120, model=TINY):
    """ranks = 0: without mpirun. stdin: bytes, or a list of objects to send as JSON lines."""
    if isinstance(stdin, list):
        stdin = b"".join(json.dumps(line).encode() + b"\n" for line in stdin)
    command = ["mpirun", "-n", str(ranks)] if ranks else []
    command += [str(BINARY), *map(str, args)]
    if model and args and args[0] != "--help":
        command += ["--model", str(model)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SFUMATO_")}  # the tester's own options
    environment |= {**MPI, **(env or {})}
    return Result(subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=timeout))


def generate(lines, *args, **more):
    """`sfumato generate` over a list of requests; a seed unless the arguments name one."""
    seed = () if "--seed" in args else ("--seed", "7")
    return launch("generate", "--quiet", "--input", "-", *seed, *args, stdin=lines, **more)


def problems(count):
    with open(TINY / "problems_dev.jsonl", encoding="utf-8") as f:
        return [json.loads(f.readline())["question"] for _ in range(count)]


def chat(question, **fields):
    return {"messages": [{"role": "user", "content": question}], **fields}


@pytest.fixture
def broken(tmp_path):
    """A function that makes a copy of models/tiny with one file changed by edit(header, data)."""

    def make(edit=None, **files):
        folder = tmp_path / "model"
        folder.mkdir()
        for source in TINY.iterdir():
            if source.suffix == ".json" or source.name == "model.safetensors":
                (folder / source.name).write_bytes(source.read_bytes())
        if edit:
            raw = (folder / "model.safetensors").read_bytes()
            n = struct.unpack("<Q", raw[:8])[0]
            header, data = json.loads(raw[8 : 8 + n]), bytearray(raw[8 + n :])
            edit(header, data)
            text = json.dumps(header).encode()
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder

    return make
