"""Checkpoints with fp8 weights: every backend reads them exactly."""
import json

import fp8_model
import pytest
from conftest import launch, problems
from places import TINY


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives (fp8 checkpoint, the same numbers in fp32) of models/tiny."""
    made = {}

    def of(scheme):
        if scheme not in made:
            top = tmp_path_factory.mktemp(scheme)
            made[scheme] = fp8_model.make(TINY, top / "fp8", top / "fp32", scheme)
        return made[scheme]

    return of


def score(model, *args):
    lines = [{"text": text} for text in problems(2)]
    result = launch("score", "--quiet", "--input", "-", "--output", "-", "--top", "5", *args, model=model, stdin=lines)
    assert result.status == 0, result.err
    return result.out


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_the_cpu_computes_with_the_very_numbers(folders, scheme):
    quantised, exact = folders(scheme)
    assert score(quantised, "--dtype", "f32") == score(exact)
    assert score(quantised, "--dtype", "f32") != score(TINY, "--dtype", "f32")


def test_inspect_knows_the_format(folders):
    result = launch("inspect", "--json", model=folders("block")[0])
    facts = json.loads(result.out)
    assert result.status == 0 and "fp8" in json.dumps(facts), facts
