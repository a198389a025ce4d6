import numpy as np
import pytest
from matplotlib import image

from jaxlm.reporting.metrics import MetricsWriter
from jaxlm.reporting.plots import plot_comparison, plot_loss, series, smooth


def write_run(run_dir, losses, validation=()):
    with MetricsWriter(run_dir, tensorboard=False, resume_step=0) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write({"step": step, "loss": loss})
        for step, loss in validation:
            writer.write({"step": step, "val_loss": loss})


def has_color(path, rgb):
    pixels = image.imread(path)[..., :3]
    return (np.abs(pixels - rgb).max(axis=-1) < 0.05).any()


BLUE, ORANGE = (0.122, 0.467, 0.706), (1.0, 0.498, 0.055)


@pytest.mark.parametrize(("losses", "validation"), [
    (list(np.linspace(4, 2, 50)), [(25, 3.1), (50, 2.2)]), ([3.0], []), ([], [(1, 2.0)]), ([float("nan"), 2.0, 1e9, 2.0], [])])
def test_the_picture_shows_what_there_is(tmp_path, losses, validation):
    write_run(tmp_path, losses, validation)
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert has_color(path, BLUE) == bool(losses)
    assert has_color(path, ORANGE) == bool(validation)
    assert {file.name for file in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}


def test_nothing_logged_is_no_picture(tmp_path):
    assert plot_loss(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_comparison(tmp_path):
    write_run(tmp_path / "a", [3.0, 2.0, 1.5])
    write_run(tmp_path / "b", [3.0, 2.5, 2.0], [(3, 2.2)])
    plot_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "both.png")
    assert has_color(tmp_path / "both.png", BLUE) and has_color(tmp_path / "both.png", ORANGE)


def test_smoothing_keeps_the_ends_ignores_a_spike_and_thins_long_curves():
    values = np.linspace(5, 1, 200)
    spiked = values.copy()
    spiked[100] = 99
    steps, smoothed = smooth(np.arange(200), spiked)
    assert smoothed[0] == 5 and smoothed[-1] == 1
    np.testing.assert_allclose(smoothed, values[steps], atol=0.05)
    steps, smoothed = smooth(np.arange(50_000), np.ones(50_000))
    assert len(steps) == len(smoothed) == 1000 and steps[0] == 0 and steps[-1] == 49_999


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 39, 40, 200, 1501])
def test_a_straight_line_stays_as_it_is_to_its_ends(length):
    """Line 15: loss.png's smoothed line jumped where its window had shrunk to one value."""
    values = 7 - 0.01 * np.arange(length)
    steps, smoothed = smooth(10 * np.arange(length), values)
    np.testing.assert_allclose(smoothed, values[steps // 10], atol=1e-6)  # float32


def test_the_last_values_noise_does_not_turn_the_line():
    draw = np.random.default_rng(0)
    line = 5 - 0.002 * np.arange(1000)
    noisy = line + draw.normal(scale=0.1, size=1000)
    noisy[[0, -1]] += 1.0  # ten deviations off, at both ends
    steps, smoothed = smooth(np.arange(1000), noisy)
    np.testing.assert_allclose(smoothed, line[steps], atol=0.15)  # of 51 values: a twentieth of the wild one shows at most
    assert np.abs(np.diff(smoothed)).max() < 0.1


def test_series_skips_what_is_missing_or_not_finite():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": float("inf")},
            {"step": 5, "loss": 1.0}]
    steps, values = series(rows, "loss")
    assert steps.tolist() == [1, 5] and values.tolist() == [2.0, 1.0]
