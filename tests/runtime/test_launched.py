"""What the environment says of several processes, and what is said when one of them is gone (lines 16 and 18)."""

import os
import socket
import subprocess
import sys

import pytest

from jaxlm.errors import UserError
from jaxlm.runtime.processes import is_one_of_several
from jaxlm.settings import DevicesSettings

HERE = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:4000", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
ABORTS = """
import os, sys
from jaxlm.runtime import runtime_log
from jaxlm.settings import Settings
runtime_log.divert(Settings(run_dir=sys.argv[1]))
os.write(2, b"F1125 04:27:27.9 1 client.h:80] Terminating because the JAX distributed service detected fatal errors.\\n")
os.write(2, b"    @     0x7f8ed8f40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()\\n")
os.abort()
"""


@pytest.mark.parametrize(("environment", "message"), [
    ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x': expected a number"),
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not"),
    (HERE | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: expected less than JAX_NUM_PROCESSES=2"),
    (HERE | {"JAX_NUM_PROCESSES": "abc"}, "JAX_NUM_PROCESSES must be a number, found 'abc'"),
    (HERE | {"JAX_COORDINATOR_ADDRESS": "host"}, "expected HOST:PORT"),
])
def test_variables_that_make_no_sense_are_named(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        is_one_of_several(DevicesSettings(platform="cpu"))


TRAINS = """
import sys
from jaxlm.cli import main
sys.exit(main(["train", *sys.argv[1:], "devices.platform=cpu", "guards.start_seconds=60"]))
"""


@pytest.mark.slow
def test_processes_that_were_told_different_things_do_not_train_together(tmp_path):
    """Under Slurm each host reads the run file for itself: a copy that differs is named, in every process."""
    (tmp_path / "run.yaml").write_text("run_dir: run\ndata: {raw: text.txt, tokenizer: bytes}\n")
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = [subprocess.Popen(
        [sys.executable, "-c", TRAINS, "run.yaml", f"train.steps={50 + number}"], cwd=tmp_path, text=True, stderr=subprocess.PIPE,
        env=os.environ | HERE | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(number)}) for number in range(2)]
    told = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert all("train.steps: process 0 has 50, process 1 51; all processes of a run take the same" in lines for lines in told)
    assert not (tmp_path / "run" / "corpus").exists()


def test_when_another_process_has_died_one_line_is_said_and_the_stack_is_in_a_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", ABORTS, str(tmp_path)], env=os.environ | HERE, capture_output=True, text=True)
    log = tmp_path / "logs" / "00001.txt"
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == ("jaxlm: process 1: another process has most likely ended, or cannot be reached any more; start all of "
                           f"them again to go on; what XLA, gRPC and Gloo said: {log}\n")
    assert "SendToLog" in log.read_text()
