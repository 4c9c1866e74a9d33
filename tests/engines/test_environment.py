"""What the machine tells of processors and their limits."""

import os
import pickle

import pytest

from lsast_engines.environment import core_limit, require_extra
from lsast_engines.errors import MissingExtraError

ALL = set(range(8))
V1 = "sys/fs/cgroup/cpu/docker/abc/"


@pytest.mark.parametrize(
    ("mask", "smt", "files", "expected"),
    [
        (ALL, False, {}, None),
        (ALL, True, {}, None),
        ({0, 1, 2}, False, {}, 3),
        ({0, 4, 1, 5}, True, {}, 2),  # two threads of a core count once
        (ALL, True, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        (ALL, False, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (ALL, False, {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (ALL, False, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "1000 100000\n"}, 1),
        (ALL, True, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "600000 100000\n"}, None),  # 4 cores
        (ALL, False, {"proc/self/cgroup": "1:cpu,cpuacct:/docker/abc\n0::/\n", V1 + "cpu.cfs_quota_us": "250000\n",
                      V1 + "cpu.cfs_period_us": "100000\n"}, 3),
        (ALL, False, {"proc/self/cgroup": "1:cpu:/docker/abc\n", V1 + "cpu.cfs_quota_us": "-1\n",
                      V1 + "cpu.cfs_period_us": "100000\n"}, None),
        ({0, 1}, False, {"proc/self/cgroup": "0::/../x\n"}, 2),
    ],
)  # fmt: skip
def test_core_limit_counts_cores_within_mask_and_quota(tmp_path, monkeypatch, mask, smt, files, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: mask, raising=False)
    for n in range(8):
        siblings = f"{n % 4},{n % 4 + 4}\n" if smt else f"{n}\n"
        files = {**files, f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": siblings}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert core_limit(tmp_path) == expected


def test_core_limit_without_affinity_masks_is_none(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS, Windows
    assert core_limit() is None


def test_missing_extra_error_reaches_another_process():
    with pytest.raises(MissingExtraError) as caught:
        require_extra("cpu", "nowhere")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.library, error.extra) == (str(caught.value), "nowhere", "cpu")
