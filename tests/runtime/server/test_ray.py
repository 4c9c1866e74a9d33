"""The application on a local Ray with two replicas, one of which is killed under load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ray_session.py")


@pytest.mark.slow
@pytest.mark.needs("ray")
def test_ray_serve_loses_nothing_when_a_replica_is_killed(split_path, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "LSAST_BUNDLE": str(split_path),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # A process of its own: Ray changes signals, logging and warnings of the one that it runs in.
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.endswith("all answered\n")
