"""`jaxlm predict`: what a model says of each record of some files, a line each, in their order."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.console.progress import progress_bar
from jaxlm.data.batches import Batches, Source, Succession
from jaxlm.data.columns import ROLES
from jaxlm.data.labelled import HeldRecords
from jaxlm.data.records import Record, read_records
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError
from jaxlm.models.model import Params
from jaxlm.runtime.processes import is_main
from jaxlm.settings import Settings
from jaxlm.storage.files import Location, absolute, as_path, check_folder, plain, write_atomically
from jaxlm.storage.remote import is_remote
from jaxlm.tasks.find import find_task
from jaxlm.training.feed import evaluation_batch_size, on_devices
from jaxlm.training.setup import lay_mesh
from jaxlm.training.stages import of_checkpoint
from jaxlm.training.step import Trainer
from jaxlm.training.trained import opened

FILE_NAME = "predictions.jsonl"
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # that JSON leaves in a text, and others cut at
BATCHES_HELD = 64  # whose records are in memory at a time


class Predictions(NamedTuple):
    """What `predict` wrote."""

    path: Location
    step: int  # of the checkpoint
    records: int
    truncated: int  # records that lost their end


def predict(settings: Settings) -> Predictions:
    """Writes what a checkpoint of run_dir says of the records of data.raw: `out`, or RUN_DIR/predictions.jsonl.

    Every process of a run calls it, and reads all records; the first one writes. Raises UserError.
    """
    if not find_task(settings).answers_records:
        raise UserError(f"predict: {find_task(settings)} says nothing of a record; expected the run directory of a model that "
                        "was trained to, for example with task.name=text_classification")
    settings, mesh = lay_mesh(of_checkpoint(settings))
    path = _free_place(settings)
    with opened(settings, mesh) as trained:
        streams = trained.saved.get("streams")  # an imported model does not say
        records = read_records(settings.data.raw, settings.data, settings.task, streams)
        first = next(records, None)  # what cannot be read is told before the weights are loaded
        if first is None:
            raise UserError("data.raw: no record in it")
        predictor, records = Predictor(trained.trainer, trained.params(), trained.tokenizer), itertools.chain([first], records)
        with progress_bar("predicting", None, "records", enabled=is_main()) as advance:
            written = _write(path, predictor.lines(records, advance))
    return Predictions(path, trained.step, written, predictor.truncated)


def _free_place(settings: Settings) -> Location:
    """Where to write. Raises UserError: it is a folder, cannot be written to, or is what is read."""
    path = as_path(settings.out or as_path(settings.run_dir) / FILE_NAME)
    check_folder(path.parent, "out")
    if not is_remote(path) and path.is_dir():
        raise UserError(f"out={path}: a folder; expected a file, for example {path / FILE_NAME}")
    raw = settings.data.raw if isinstance(settings.data.raw, list) else [settings.data.raw]
    if any(absolute(path) == absolute(file) for file in raw):
        raise UserError(f"out={path}: the file of records, which would be lost; name another")
    return path


def _write(path: Location, lines: Iterable[str]) -> int:
    """How many there were."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:  # half characters: JSON's own escapes
            for line in lines:
                file.write(line)
                count += 1

    if is_main():
        write_atomically(path, write)
    else:
        count = sum(1 for _ in lines)  # all processes have to compute each batch
    return count


class Predictor:
    """A trained model with its tokenizer. Made under `jax.set_mesh`."""

    def __init__(self, trainer: Trainer, params: Params, tokenizer: Tokenizer):
        self.trainer, self.params, self.tokenizer = trainer, params, tokenizer
        self.task = find_task(trainer.settings)
        self.batch_size = evaluation_batch_size(trainer.settings)
        self.truncated = 0
        everywhere = NamedSharding(trainer.mesh, PartitionSpec())  # every process reads all answers
        self._answers = jax.jit(trainer.model.traced(trainer.model.answers), out_shardings=everywhere)

    def lines(self, records: Iterable[Record], advance: Callable[[int], None]) -> Iterator[str]:
        """A line of JSON for each: its texts, the answer, and its other columns."""
        records = iter(records)
        while held := list(itertools.islice(records, BATCHES_HELD * self.batch_size)):
            for record, answer in zip(held, self.answers([record.texts for record in held]), strict=True):
                line = json.dumps(plain(self._line(record, answer)), ensure_ascii=False, allow_nan=False)
                yield f"{line.translate(LINE_ENDS)}\n"
            advance(len(held))

    def answers(self, texts: list[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
        """What is said of each record, given as its texts."""
        sequences = self.task.cut(HeldRecords.of(texts, self.tokenizer), self.tokenizer, training=False)
        self.truncated += sequences.truncated
        source = Source("data.raw", sequences, 0, 0, training=False)
        batches = Batches([source], Succession([sequences.count]), [1], self.batch_size, skip_damaged=False)
        with on_devices(batches, 0, len(batches), self.trainer.mesh, self.trainer.settings.data.prefetch) as batches_there:
            for number, batch in enumerate(batches_there):
                said = jax.device_get(self._answers(self.params, batch))
                for row in range(min(self.batch_size, sequences.count - number * self.batch_size)):
                    yield self.task.answer({name: array[row] for name, array in said.items()})

    def _line(self, record: Record, answer: dict[str, Any]) -> dict[str, Any]:
        line = dict(zip(ROLES, record.texts, strict=False)) | answer
        return line | {f"given_{name}" if name in line else name: value for name, value in record.columns.items()}
