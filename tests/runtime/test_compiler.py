"""Flags and the folder of compiled programs, as a process at its start sees them."""

import json
import os
import subprocess
import sys

import pytest

from jaxlm.runtime import compiler
from jaxlm.runtime.compiler import BACKENDS, Backend, set_flags

SMALL = ["model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.max_length=16", "model.vocab_size=100",
         "data.sequence_length=16", "data.global_batch_size=2", "devices.platform=cpu", "bench.steps=1", "bench.warmup_steps=1"]


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(compiler, "find_spec", lambda name: True)


@pytest.mark.usefixtures("installed")
def test_the_users_own_flags_come_last_and_so_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_gather=false")
    set_flags("gpu")
    flags = os.environ["XLA_FLAGS"].split()
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags
    assert flags[-1] == "--xla_gpu_enable_pipelined_all_gather=false"
    set_flags("gpu")  # as the processes of --processes do, which inherit them
    assert os.environ["XLA_FLAGS"].split() == flags


def test_a_backend_that_is_not_installed_gets_no_flags(monkeypatch):
    monkeypatch.setitem(BACKENDS, "gpu", Backend("XLA_FLAGS", ("no_such_package",), {"xla_gpu_something": "true"}))
    monkeypatch.setenv("XLA_FLAGS", "")
    set_flags("gpu")
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.usefixtures("installed")
def test_xla_knows_every_flag(monkeypatch):
    """An unknown one would end the process. GPU flags are known to XLA's CPU build, too; libtpu's are seen with
    libtpu only."""
    monkeypatch.setenv("XLA_FLAGS", "")
    set_flags("gpu")
    program = "import jax; jax.config.update('jax_platforms', 'cpu'); print(jax.jit(lambda x: x + 1)(1))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2", done.stderr


def test_a_second_start_finds_its_programs_compiled(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("{}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", "jaxlm", "bench", str(config), *SMALL, f"devices.compiled={tmp_path / 'compiled'}", "--json"]
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "JAX_EXPLAIN_CACHE_MISSES": "true"}
    names = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["devices"] == 1
        names.append({path.name for path in (tmp_path / "compiled").glob("*-cache")})
    assert names[0] and names[0] == names[1]
    assert any("train_step" in name for name in names[0])
