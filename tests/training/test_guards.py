"""Steps with bad numbers, in the compiled step; a model of three numbers (see test_step.py) whose gradient is known."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from test_step import TARGETS, line, line_settings

from jaxlm.safety.guards import LEAST, WINDOW, is_good, nothing_yet, remembered
from jaxlm.settings import GuardSettings

BAD = {"nan": np.nan, "infinite": np.inf, "overflowing": 1e30}  # the square of the last is no float32


def run(settings, batches):
    """State and metrics after each batch."""
    trainer, mesh = line(settings)
    found = []
    with jax.set_mesh(mesh):
        state = trainer.init(0)
        for batch in batches:
            state, metrics = trainer.step(state, batch)
            found.append(jax.device_get((state, metrics)))
    return found


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_step_changes_nothing_but_the_clock(value):
    """The optimizer's moments, too; and the schedule goes on by the run's clock, as if the step had been taken."""
    settings = line_settings()
    settings = replace(settings, optimizer=replace(settings.optimizer, name="adamw", b1=0.9))
    bad = TARGETS | {"tokens": np.full_like(TARGETS["tokens"], value)}
    (one, _), (two, skipped), (three, metrics) = run(settings, [TARGETS, bad, TARGETS])
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.optimizer), (two.params, two.optimizer))
    assert [int(state.step) for state in (one, two, three)] == [1, 2, 3]
    assert (skipped["skipped_steps"], skipped["skipped_in_a_row"]) == (1, 1)
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (1, 0)
    assert metrics["learning_rate"] == run(settings, [TARGETS] * 3)[-1][1]["learning_rate"]
    assert not np.array_equal(three.params["w"]["kernel"], two.params["w"]["kernel"])
    assert np.isfinite(three.params["w"]["kernel"]).all()


def test_skips_in_a_row_are_counted_until_a_good_step():
    bad = TARGETS | {"tokens": TARGETS["tokens"] * np.float32(np.nan)}
    rows = [metrics for _, metrics in run(line_settings(), [bad, bad, TARGETS, bad])]
    assert [int(row["skipped_in_a_row"]) for row in rows] == [1, 2, 0, 1]
    assert [int(row["skipped_steps"]) for row in rows] == [1, 2, 2, 3]


def test_a_spike_is_skipped_only_when_asked_for():
    settings = line_settings()
    settings = replace(settings, train=replace(settings.train, steps=100))
    usual = [TARGETS | {"tokens": TARGETS["tokens"] * np.float32(1 + 0.01 * np.sin(step))} for step in range(LEAST + 3)]
    high = TARGETS | {"tokens": TARGETS["tokens"] * np.float32(100)}
    for sigma, skipped in ((None, 0), (8.0, 1)):
        rows = run(replace(settings, guards=GuardSettings(spike_sigma=sigma)), [*usual, high, TARGETS])
        assert [int(metrics["skipped_steps"]) for _, metrics in rows[-3:]] == [0, skipped, skipped]


def test_a_spike_is_measured_by_the_last_good_steps():
    """Against NumPy, over more steps than the window holds."""
    random, recent = np.random.default_rng(0), nothing_yet()
    losses, norms = random.normal(5, 1, 3 * WINDOW).astype(np.float32), random.normal(2, 0.3, 3 * WINDOW).astype(np.float32)
    kept = []
    for loss, norm in zip(losses, norms, strict=True):
        good = bool(is_good(recent, loss, norm, 1, 2.0))
        window = np.array(kept[-WINDOW:])
        limits = window.mean(0) + 2 * window.std(0) if len(kept) >= LEAST else [np.inf, np.inf]
        assert good == bool((np.array([loss, norm]) <= limits).all())
        recent = remembered(recent, loss, norm, np.bool_(good))
        kept += [(loss, norm)] if good else []
    assert 0 < int(recent.skipped) == len(losses) - len(kept)


def test_whoever_falls_below_the_mean_is_no_spike():
    recent = nothing_yet()
    for step in range(LEAST):
        recent = remembered(recent, np.float32(5 + step % 2), np.float32(1 + step % 2), np.bool_(True))
    assert is_good(recent, np.float32(0.1), np.float32(0.0), 1, 3.0)
    assert not is_good(recent, np.float32(0.1), np.float32(0.0), 0, 3.0)  # nothing was predicted
    assert not is_good(recent, np.float32(50), np.float32(1.0), 1, 3.0)
    assert not is_good(recent, np.float32(5), np.float32(50), 1, 3.0)
