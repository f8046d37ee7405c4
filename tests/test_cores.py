"""Cores that a process may use."""

import os
import subprocess
import sys

import pytest

from cuobs.cores import cores


def tree(root, **quotas):
    """Folders of control groups with what their files say."""
    for path, text in quotas.items():
        folder = root / path.replace("_", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, line in text.items():
            (folder / name).write_text(line + "\n")


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)


@pytest.mark.parametrize("inner, outer, count", [
    ("max 100000", "max 100000", 64), ("250000 100000", "max 100000", 3),
    ("max 100000", "400000 100000", 4), ("800000 100000", "150000 100000", 2),
    ("1000 100000", "max 100000", 1),
])
def test_quotas_of_control_groups(many, tmp_path, inner, outer, count):
    """The smallest of those that the process is in, outer ones too; part of a core is one."""
    (tmp_path / "own").write_text("0::/a/b\n")
    tree(tmp_path / "root", a={"cpu.max": outer}, a_b={"cpu.max": inner}, c={"cpu.max": "1 100000"})
    assert cores(tmp_path / "own", tmp_path / "root") == count


@pytest.mark.parametrize("quota, count", [("-1", 64), ("300000", 3)])
def test_quotas_of_the_first_version(many, tmp_path, quota, count):
    (tmp_path / "own").write_text("3:memory:/a\n2:cpu,cpuacct:/a\n1:name=systemd:/\n")
    folder = tmp_path / "root" / "cpu,cpuacct" / "a"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(quota)
    (folder / "cpu.cfs_period_us").write_text("100000")
    assert cores(tmp_path / "own", tmp_path / "root") == count


def test_where_there_are_no_control_groups(many, tmp_path):
    assert cores(tmp_path / "none", tmp_path) == 64


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities here")
def test_affinity():
    """Of a process that may use one core, whatever the machine has."""
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); " \
        "from cuobs.cores import cores; print(cores())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "1\n"
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
