"""benchmarks/long_run.py: what it sees of a run from outside."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_is_looked_at_while_it_goes_on():
    done = subprocess.run([sys.executable, "-m", "benchmarks.long_run", "--iterations", "20"], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    head, *rows, end = done.stdout.splitlines()
    assert head.split() == ["iteration", "MiB", "s/iteration", "metrics.jsonl", "checkpoints", "pictures", "live"]
    found = [re.findall(r"[\d.]+", row) for row in rows]
    assert len(found) >= 3 and all(100 < float(row[1]) < 4000 and 0 < float(row[2]) < 600 for row in found)
    assert [int(row[0]) for row in found] == [1, 4, 9, 14, 19][:len(found)] and all(row[3] == "1" for row in found)
    written = [int(row[4]) for row in found]  # KiB of metrics.jsonl, which alone grows by every iteration
    assert written == sorted(written) and written[0] < written[-1]
    assert re.search(r"metrics\.jsonl 1 files, .*checkpoints 2 files, \d+ KiB, pictures \d+ files", end)
