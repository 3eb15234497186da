"""One server for all clients: `mpirun -n 2 sfumato serve` on models/tiny, or the one that SFUMATO_URL (and
SFUMATO_GRPC) name."""
import json
import os
import pathlib
import sys
import types

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "blackbox"))

from places import TINY  # noqa: E402
from served import BothServer as Server  # noqa: E402

QUESTION = "Tom has 8 pens. Tom buys 4 more. Then Tom loses 2 pens. How many pens does Tom have now?"


@pytest.fixture(scope="session")
def server():
    if os.environ.get("SFUMATO_URL"):
        yield types.SimpleNamespace(url=os.environ["SFUMATO_URL"], grpc=os.environ.get("SFUMATO_GRPC"))
        return
    with Server("--max-num-seqs", "8", ranks=2) as s:
        yield s


@pytest.fixture(scope="session")
def make_server():
    """A server of its own, for tests that drain it, lock it, or fill its queue."""
    return Server


@pytest.fixture(scope="session")
def question():
    return QUESTION


def problems(count):
    """Questions of the development set, as many as asked for."""
    with open(TINY / "problems_dev.jsonl", encoding="utf-8") as f:
        return [json.loads(f.readline())["question"] for _ in range(count)]


@pytest.fixture(scope="session")
def questions():
    return problems
