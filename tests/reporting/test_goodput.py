"""What the wall time of a run with several starts went into."""

import json

import pytest

from jaxlm.reporting.goodput import FILE_NAME, PARTS, Account, goodput
from jaxlm.reporting.report import time_spent


def line(began, seconds, first, last, skipped=0, **parts):
    return json.dumps({"began": began, "seconds": seconds, "from": first, "to": last, "skipped": skipped,
                       **{part: parts.get(part, 0.0) for part in PARTS}})


def test_no_time_at_all_has_no_shares(tmp_path):
    (tmp_path / FILE_NAME).write_text(line(1000.0, 0.0, 0, 0))
    assert time_spent(goodput(tmp_path))["goodput"].startswith("0.0% of 0")


def test_every_second_is_accounted_for_once(tmp_path):
    (tmp_path / FILE_NAME).write_text("\n".join([
        line(1000.0, 5.0, 0, 0, startup=5.0),
        line(1000.0, 40.0, 0, 100, startup=5.0, compile=10.0, steps=20.0, data_wait=1.0, checkpoint=2.0),  # then it was killed
        '{"began": 1000.0, "sec',
        line(1070.0, 100.0, 80, 200, skipped=12, startup=5.0, compile=1.0, steps=60.0, evaluation=3.0)]))
    found = goodput(tmp_path)
    assert (found["starts"], found["repeated_steps"], found["skipped_steps"], found["wall_seconds"]) == (2, 20, 12, 170.0)
    assert found["repeated_seconds"] == pytest.approx(20 * 20 / 100)  # 20 of the first 100 steps were done again
    assert found["skipped_seconds"] == pytest.approx(12 * 60 / 120)
    assert found["restarts_seconds"] == pytest.approx(30.0)
    assert found["productive_seconds"] == pytest.approx(20 + 60 - 4 - 6)
    assert found["goodput"] == pytest.approx(70 / 170)
    seconds = [value for name, value in found.items() if name.endswith("_seconds") and name != "wall_seconds"]
    assert sum(seconds) == pytest.approx(found["wall_seconds"])
    shown = time_spent(found)
    assert shown["goodput"] == "41.2% of 2m50s, in 2 starts" and shown["repeated steps"] == "20"
    assert shown["steps done again"] == "4.0s (2.4%)" and "waiting for checkpoints" in shown


def test_an_account_keeps_what_a_start_has_spent(tmp_path):
    assert goodput(tmp_path) is None
    account = Account()
    account.begin(tmp_path, 10)
    with account.spending("steps"):
        sum(range(100_000))
    account.reached(14, 1)
    account.close()
    [*_, last] = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(last)["to"] == 14 and json.loads(last)["skipped"] == 1
    found = goodput(tmp_path)
    assert found["starts"] == 1 and 0 < found["productive_seconds"] < found["wall_seconds"]
