"""When a run is started again, with how many processes, and when it is given up."""

from collections.abc import Iterator

import pytest

from jaxlm.checkpoints.manifest import newest_step
from jaxlm.safety import supervisor
from jaxlm.safety.launcher import HUNG
from jaxlm.settings import MeshSettings, Settings


class Processes:
    """Ends each group of processes with the next of some (exit code, newest checkpoint)."""

    def __init__(self, run_dir, endings):
        self.run_dir, self.endings, self.started, self.stopped = run_dir, iter(endings), [], None
        self.ending = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, arguments, num_processes):
        self.started.append(num_processes)
        code, step = next(self.endings)
        folder = self.run_dir / "checkpoints" / str(step)
        if step:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").touch()
        return code


@pytest.fixture
def supervise(tmp_path, monkeypatch) -> Iterator:
    pauses = []
    monkeypatch.setattr(supervisor, "_sleep", lambda seconds, launcher: pauses.append(seconds))

    def run(*endings, processes=4, restarts=3, elastic=False):
        group = Processes(tmp_path, endings)
        monkeypatch.setattr(supervisor, "Launcher", lambda: group)
        settings = Settings(run_dir=str(tmp_path), mesh=MeshSettings(data=4, elastic=elastic))
        return supervisor.supervise(["train"], settings, processes, restarts, newest_step), group.started, pauses

    return run


def test_a_run_that_gets_on_is_started_again_for_ever(supervise):
    endings = [(1, step) for step in range(10, 110, 10)]
    code, started, pauses = supervise(*endings, (HUNG, 110), (0, 120))
    assert code == 0 and started == [4] * 12 and set(pauses) == {0.0}


def test_one_that_does_not_is_given_up_after_growing_pauses(supervise, capsys):
    code, started, pauses = supervise((1, 10), (1, 10), (HUNG, 10), (1, 10), (1, 10))
    assert code == 1 and len(started) == 5 and pauses == [0.0, 1.0, 3.0, 7.0]
    assert "failed 4 times in a row without a new checkpoint; giving up" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 2, 3, 130, 143])
def test_what_is_done_or_would_fail_again_or_was_stopped_is_left(supervise, code):
    assert supervise((code, 10)) == (code, [4], [])


def test_without_restarts_the_first_ending_counts(supervise):
    assert supervise((HUNG, 10), restarts=0) == (HUNG, [4], [])


def test_an_elastic_run_goes_on_with_fewer_processes_and_then_with_all(supervise):
    code, started, _ = supervise((1, 0), (1, 0), (1, 0), (1, 0), (1, 20), (0, 30), restarts=9, elastic=True)
    assert code == 0 and started == [4, 4, 2, 2, 1, 4]


def test_a_finished_run_is_not_started_again(tmp_path, monkeypatch, supervise, capsys):
    """Killed while it wrote its samples: all steps are saved and added up (line 16)."""
    steps = Settings().train.steps
    monkeypatch.setattr(Processes, "run", lambda self, arguments, number: finish(self.run_dir, steps))
    code, _, pauses = supervise()
    assert code == 0 and pauses == []
    assert f"all {steps} steps were done and saved" in capsys.readouterr().err


def finish(run_dir, steps):
    folder = run_dir / "checkpoints" / str(steps)
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    (run_dir / "summary.json").write_text(f'{{"steps": {steps}}}')
    return 1
