"""A load generator that knows nothing of us: twenty users for some seconds, no failed request, nothing left behind."""
import csv
import pathlib
import re
import subprocess
import sys
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent


def gauge(server, name):
    text = urllib.request.urlopen(server.url + "/metrics").read().decode()
    return sum(float(v) for v in re.findall(rf"^sfumato:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.M))


def test_load(server, tmp_path):
    command = [pathlib.Path(sys.executable).parent / "locust", "-f", HERE / "locustfile.py", "--headless", "--users", "20", "--spawn-rate", "20",
               "--run-time", "12s", "--stop-timeout", "20", "--host", server.url, "--csv", tmp_path / "load", "--only-summary"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = {row["Name"]: row for row in csv.DictReader(open(tmp_path / "load_stats.csv"))}
    assert {"stream", "left early", "/v1/chat/completions", "/health"} <= set(rows)
    assert int(rows["Aggregated"]["Request Count"]) > 100 and int(rows["Aggregated"]["Failure Count"]) == 0, rows
    end = time.monotonic() + 20
    while gauge(server, "num_requests_running") + gauge(server, "num_requests_waiting") > 0 and time.monotonic() < end:
        time.sleep(0.1)
    assert gauge(server, "num_requests_running") == gauge(server, "num_requests_waiting") == 0
