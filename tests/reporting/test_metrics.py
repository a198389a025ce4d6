import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxlm.reporting.metrics import MetricsWriter, read_metrics
from jaxlm.storage.files import write_json


def fill(run_dir, steps, resume_step=0, **options):
    with MetricsWriter(run_dir, tensorboard=False, resume_step=resume_step, **options) as writer:
        for step in steps:
            writer.write({"step": step, "loss": step / 10})


def read_events(run_dir):
    """All TensorBoard events, by the TFRecord format: length (8 bytes), its CRC (4), data, its CRC (4)."""
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_rows_come_back_as_they_were_written(tmp_path):
    row = {"step": 3, "loss": np.float32(1.5), "mfu": None, "tokens": np.int64(7), "learning_rate": np.array(0.25), "note": "é"}
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=0) as writer:
        writer.write(row)
        assert read_metrics(tmp_path) == [row]  # before closing: every row is flushed


def test_what_json_has_no_number_for_becomes_null(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=0) as writer:
        writer.write({"step": 1, "loss": math.nan, "grad_norm": np.float32(np.inf)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    fill(tmp_path, [10, 20, 30])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    fill(tmp_path, [30, 40], resume_step=20)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30, 40]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20, 30, 40]


def test_interrupted_and_resumed_gives_the_same_file(tmp_path):
    fill(tmp_path / "whole", range(1, 9))
    fill(tmp_path / "parts", range(1, 7))
    fill(tmp_path / "parts", range(5, 9), resume_step=4)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_same_scalars_and_hides_purged_steps(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=0) as writer:
        writer.write({"step": 10, "loss": 2.5, "mfu": None, "note": "text"})
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=4) as writer:
        writer.write({"step": 6, "loss": 1.5})
    events = read_events(tmp_path)
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert sorted(scalars) == [(6, "loss", 1.5), (10, "loss", 2.5)]
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [1, 5]  # TensorBoard drops what older files hold from this step on


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
