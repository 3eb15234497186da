"""A minute of bench/soak (issue: an hour of mixed load shows flat memory): R7, R9, R12 under everything at once.

The hour itself is run by hand, with its figures in bench/results/; here the bound of memory is looser, as a minute is
mostly warming up. Statuses, shapes, equality by seed, pages and the drain are judged as in the hour. A sanitized
server gets less time, and what it finds counts, not its memory.
"""
import json
import subprocess
import sys

from places import BUILD, SOURCE
from served import SANITIZED


def test_R7_R9_R12_a_minute_of_mixed_load(tmp_path):
    report = tmp_path / "soak.json"
    much = ["--seconds", "30", "--rate", "4", "--growth-mb", "1e6", "--no-deep"] if SANITIZED else \
        ["--seconds", "60", "--rate", "8", "--growth-mb", "8"]
    done = subprocess.run(
        [sys.executable, str(SOURCE / "bench" / "soak"), "--build", str(BUILD), *much, "--warm-up", "10", "--every", "2",
         "--report", str(report)],
        capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["passed"] and found["problem_count"] == 0 and found["pages_used_at_end"] == 0
    assert found["requests"] > 60 and found["statuses"]["200"] > 60
    assert not [s for s in found["statuses"] if s.startswith("5")]
