"""What a run directory says about itself.

Everything is read from its files, so that a run that is going on, or was killed, says what it has so far.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxlm.errors import UserError, nearest, shown
from jaxlm.reporting.metrics import is_number, read_metrics
from jaxlm.settings import flat, nest
from jaxlm.storage.files import Location, as_path, exists, name_of, names_in, read_text
from jaxlm.values import parse_yaml, typed

# Of summary.json; what else it holds is shown as it is.
NUMBERS = ("steps", "tokens", "slots", "parameters", "loss", "val_loss", "tokens_per_second", "slots_per_second", "mfu",
           "wall_seconds", "compile_seconds", "devices")


Changed = dict[str, list[Any]]  # key -> [before, after]


@dataclass(frozen=True)
class Run:
    """The files of one run directory, read once."""

    path: Location
    config: dict[str, Any]  # flat: "model.num_layers" -> 12
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None: still running, or stopped before the end

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def steps(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if is_number(row.get("val_loss"))]

    @property
    def changes(self) -> Iterator[tuple[int, Changed]]:
        """Steps from which the run went on with other settings, and which those are."""
        for row in self.rows:
            if isinstance(row.get("changed"), dict):
                yield row["step"], {key: values for key, values in row["changed"].items()
                                    if isinstance(values, list) and len(values) == 2}

    def setting(self, key: str) -> str:
        """A key of the config as text: what it was for the whole run, or `0.001 to step 300, then 0.0005`."""
        parts = [f"{yaml_scalar(changed[key][0])} to step {step}" for step, changed in self.changes if key in changed]
        return ", then ".join([*parts, yaml_scalar(self.config[key]) if key in self.config else "?"])

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if is_number(row.get(key))]

    @property
    def best(self) -> str | None:
        """The best of the kept checkpoints by the task's figure, for people; None: it is not known, or is the lowest
        loss."""
        return best_told((self.summary or {}).get("best"))

    def figure(self, key: str) -> Any:
        """A figure of summary.json; before that file exists, the same figure from the rows so far; else None."""
        if key == "val_bits_per_byte":  # what runs with different tokenizers can be compared by
            return next(iter(self.values(key)[-1:]), None)
        if self.summary is not None:
            return self.summary.get(key)
        if key == "val_loss":
            return self.evaluations[-1]["val_loss"] if self.evaluations else None
        if key in ("tokens_per_second", "slots_per_second", "mfu"):
            return statistics.median(self.values(key)) if self.values(key) else None
        if key == "tokens" and self.values("tokens"):
            return self.values("tokens")[-1]
        if key in ("tokens", "slots"):
            batch, length = self.config.get("data.global_batch_size"), self.config.get("data.sequence_length")
            return self.steps * batch * length if batch and length else None
        return None


def read_run(run_dir: str | Path) -> Run:
    """Raises UserError when `run_dir` is not the directory of a run."""
    path = as_path(run_dir)
    config_file = path / "config.yaml"
    try:
        config = flatten(typed(parse_yaml(read_text(config_file))[0] or {}))
        stages = [flatten(typed(nest(flat(stage)))) for stage in config.get("stages") or []]
        config |= {"stages": stages} | (stages[-1] if stages else {})  # as the run ends
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        runs = [str(path.parent / name) for name in names_in(path.parent) if exists(path.parent / name / "config.yaml")]
        what = "has no config.yaml" if exists(path) else "is not there"
        raise UserError(f"{run_dir}: expected the directory of a run, but it {what}{nearest(str(path), runs)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, RecursionError) as error:
        raise UserError(f"{config_file}: expected the YAML of a run's config: {' '.join(str(error).split())}") from None
    rows = read_metrics(path)
    summary = read_summary(path / "summary.json")
    last_step = max((row["step"] for row in rows), default=0)
    if summary and summary["steps"] < last_step:
        summary = None  # of an earlier end: the run was told to go on
    return Run(path, config, rows, summary)


def read_summary(path: Location) -> dict[str, Any] | None:
    remedy = "delete the file to report from metrics.jsonl"
    try:
        summary = dict(json.loads(read_text(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: expected one JSON object; {remedy}") from None
    for key, value in ({"steps": 0} | summary).items():
        if key in NUMBERS and not is_number(value) and (value is not None or key == "steps"):
            raise UserError(f"{path}: {key} is {shown(value)}, expected a number; {remedy}")
    return {"steps": 0} | summary


def best_told(best: Any) -> str | None:
    """`best` of summary.json, for people: accuracy 0.7959 at step 390."""
    if not isinstance(best, dict) or not is_number(best.get("value")) or best.get("figure") in (None, "val_loss"):
        return None
    return f"{str(best['figure']).removeprefix('val_').replace('_', ' ')} {best['value']:.4f} at step {best.get('step')}"


def yaml_scalar(value: Any) -> str:
    """As the key would stand in a config file: null, true, 0.1."""
    return json.dumps(value) if value is None or isinstance(value, (bool, list, dict)) else str(value)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
