"""The hang watch, in processes of its own, since it ends them."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlm.safety.launcher import HUNG
from jaxlm.safety.watch import Watch

STUCK = """
import sys, time
from jaxlm.safety.watch import Watch
def somewhere_deep():
    time.sleep(60)
with Watch(sys.argv[1]) as watch:
    with watch.phase("step 3", 0.5):
        with watch.phase("waiting for batch 3"):
            somewhere_deep()
"""
BUSY = """
import sys, time
from jaxlm.safety.watch import Watch
with Watch(sys.argv[1]) as watch:
    for _ in watch.each(range(8), "batch", 0.5):
        time.sleep(0.2)
print("through")
"""


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)


def test_what_takes_too_long_ends_the_process_and_leaves_its_stacks(tmp_path):
    done = run(STUCK, tmp_path)
    assert done.returncode == HUNG
    assert "HUNG: process 0 at 'step 3: waiting for batch 3' for more than 0.5s" in done.stderr
    [stacks] = (tmp_path / "hangs").iterdir()
    assert "somewhere_deep" in stacks.read_text() and str(stacks) in done.stderr


def test_every_round_has_its_own_deadline(tmp_path):
    done = run(BUSY, tmp_path)
    assert done.returncode == 0 and "through" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_silent_process_is_named_before_the_busy_ones(tmp_path):
    watches = [Watch(tmp_path / "run") for _ in range(3)]
    for number, watch in enumerate(watches):
        watch.process, watch.num_processes = number, 5  # without threads of its own
        with watch.phase(f"step {7 - number // 2}"):
            watch._beat()
    os.utime(watches[1]._sign(1), (time.time() - 90,) * 2)
    with watches[0].phase("step 7"):
        missing, also_missing, silent, busy = watches[0].others()
    assert "process 3" in missing and "process 4" in also_missing
    assert "process 1" in silent and "no sign of life for 1m3" in silent and "'step 7'" in silent
    assert "process 2" in busy and "'step 6'" in busy


@pytest.mark.parametrize("number", [1, 2])
def test_nothing_is_left_of_a_run_that_was_refused(number, tmp_path):
    with Watch(tmp_path / "run") as watch:
        watch.one_of(0, number)
        time.sleep(0.1)
    assert not (tmp_path / "run").exists()


def test_processes_may_end_at_the_same_moment(tmp_path):
    """Each removes its sign, and whoever is last the folders, which another may just have removed."""
    def live(process: int, start: threading.Barrier) -> None:
        with Watch(tmp_path / "run") as watch:
            watch.one_of(process, 8)
            start.wait()

    for _ in range(30):
        start = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            for ended in [pool.submit(live, process, start) for process in range(8)]:
                ended.result()
        assert not (tmp_path / "run").exists()
