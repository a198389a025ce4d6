import pytest

from jaxlm.console.units import (
    counted,
    format_count,
    format_duration,
    format_milliseconds,
    format_scientific,
    format_seconds,
    format_size,
)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (950, "950"), (999.6, "1k"), (12345.6, "12.3k"), (124_439_808, "124M"), (1.5e9, "1.5B"), (2e12, "2T"),
    (5e15, "5000T")])
def test_counts(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0.0s"), (9.5, "9.5s"), (9.97, "10s"), (59.6, "1m00s"), (73, "1m13s"), (3600, "1h00m"), (7530, "2h05m"),
    (273_600, "3d04h")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_milliseconds_and_scientific():
    assert [format_milliseconds(s) for s in (0.083, 0.00831, 5.61)] == ["83 ms", "8.31 ms", "5610 ms"]
    assert [format_scientific(v) for v in (2.9e-4, 0.0, 1.0)] == ["2.9e-4", "0", "1.0e0"]


def test_a_counted_noun_is_plural_but_for_one():
    assert [counted(n, "file") for n in (0, 1, 1024)] == ["0 files", "1 file", "1,024 files"]
    assert counted(2, "process") == "2 processes"


def test_sizes_and_seconds():
    assert [format_size(size) for size in (2048, 5 * 2**20, 150 * 2**20, 3.424 * 2**30)] == [
        "2 KiB", "5.00 MiB", "150 MiB", "3.42 GiB"]
    assert [format_seconds(seconds) for seconds in (1.2412, 0.08314)] == ["1.24 s", "83.1 ms"]
