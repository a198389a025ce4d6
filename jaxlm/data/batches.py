"""Batches: pure functions of (corpora, seed, step), whoever asks for them, from whatever step on.

Row r of step s is sample s * global_batch_size + r of an endless sequence. A sample number leads to a corpus of the
mixture and a number in it, that to an epoch and a place, and that, through the epoch's permutation, to one sequence
of the corpus.

What the arrays of a row are is its task's affair (`jaxlm.data.rows.Spec`).

A row whose text is damaged ends the run, or (data.damaged=skip) holds nothing: padding, with masks that are all False;
the others stay as they are.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np

from jaxlm.data.corpus import Corpus
from jaxlm.data.damage import Damage, DamagedData
from jaxlm.data.manifest import MANIFEST
from jaxlm.data.randomness import OFFSET, ORDER, SAMPLE, VALIDATION, make_keys, shuffled
from jaxlm.data.rows import Rows, Sequences, empty_rows
from jaxlm.errors import UserError

MIXTURE_PERIOD = 2**16  # weights are rounded to multiples of its inverse
VALIDATION_SEED = 0  # masks and pairs are the same at each evaluation, of whichever run
MAX_READ_THREADS = 4

Cut = Callable[[Corpus, bool], Sequences]  # (corpus, whether for training): its split, cut into sequences; or UserError


class Example(NamedTuple):
    """What a row of a batch is made of."""

    corpus: str  # its folder
    split: str
    epoch: int
    sequence: int  # its number in the split
    spans: list[tuple[int, int]]  # of the split's stream: first token and end, as `Documents.read` takes them


@dataclass(frozen=True)
class Source:
    """The sequences of one split of one corpus."""

    corpus: str  # its folder
    sequences: Sequences
    number: int  # among the sources
    seed: int
    training: bool  # shuffled, epoch after epoch; else in order, once

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of its samples (int64 [n]): the epoch, and the sequence of the split (int64 [n])."""
        if not self.training:
            return np.zeros_like(numbers), numbers
        epochs, places = np.divmod(numbers, self.sequences.count)
        return epochs, shuffled(places, self.sequences.count, make_keys(self.seed, ORDER, self.number, epochs))

    def keys(self, numbers: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The keys of the samples' epochs and of the samples themselves (uint64 [n])."""
        if not self.training:
            keys = make_keys(VALIDATION_SEED, VALIDATION, self.number, numbers)
            return keys, keys
        return make_keys(self.seed, OFFSET, self.number, epochs), make_keys(self.seed, SAMPLE, self.number, numbers)

    def rows(self, numbers: np.ndarray) -> Rows:
        """The samples `numbers` (int64 [n]) of this source. Raises DamagedData."""
        epochs, indices = self.places(numbers)
        return self.sequences.rows(indices, *self.keys(numbers, epochs))

    def examples(self, numbers: np.ndarray) -> list[Example]:
        """What the samples `numbers` (int64 [n]) of this source are made of; reads no text."""
        epochs, indices = self.places(numbers)
        spans = self.sequences.spans(indices, *self.keys(numbers, epochs))
        split = "train" if self.training else "validation"
        return [Example(self.corpus, split, *row) for row in zip(epochs.tolist(), indices.tolist(), spans, strict=True)]


class Mixture:
    """Endless: of any stretch of samples each source has its share. Nothing is drawn; one pattern repeats."""

    length = sys.maxsize

    def __init__(self, weights: Sequence[float]):
        shares = np.asarray(weights, float) / sum(weights) * MIXTURE_PERIOD
        self.counts = np.maximum(1, np.diff(np.rint(np.cumsum(shares)), prepend=0)).astype(np.int64)
        source = np.repeat(np.arange(len(weights)), self.counts)
        rank = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((rank + 0.5) / self.counts[source], kind="stable")  # each source evenly spread
        self.source, self.rank = source[order], rank[order]

    def pick(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample number (int64 [n]): its source, and which of that source's samples it is (int64 [n])."""
        periods, places = np.divmod(numbers, len(self.source))
        source = self.source[places]
        return source, periods * self.counts[source] + self.rank[places]


class Succession:
    """One source after the other, each sequence once; then none (source -1)."""

    def __init__(self, counts: Sequence[int]):
        self.ends = np.cumsum(counts)
        self.begins = self.ends - counts
        self.length = int(self.ends[-1])

    def pick(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source = np.searchsorted(self.ends, numbers, side="right")
        source[numbers >= self.length] = -1
        return source, numbers - self.begins[source]


class Batches:
    """`batch(step)` for the steps 0 .. len(self). Made by `training_batches` and `validation_batches`.

    damage: what was skipped so far; None where damaged text is not to be skipped, but raises DamagedData.
    """

    def __init__(self, sources: list[Source], order: Mixture | Succession, shares: Sequence[float], global_batch_size: int,
                 skip_damaged: bool):
        self.sources, self.order = sources, order
        self.damage = Damage() if skip_damaged else None
        self.global_batch_size = global_batch_size
        self.sequences_per_epoch = sum(source.sequences.count for source in sources)  # with several corpora: of all together
        self.padding_share = float(np.average([source.sequences.padding_share for source in sources], weights=shares))
        self.spec = sources[0].sequences.spec

    def __len__(self) -> int:
        """Validation: batches in the split, of which the last may have rows of padding. Training: more than any run
        takes."""
        return -(-self.order.length // self.global_batch_size)

    def batch(self, step: int, rows: np.ndarray | None = None) -> Rows:
        """The rows (numbers below global_batch_size; None: all) of the batch of a step; IndexError outside of 0 ..
        len(self)."""
        return self.samples(self.numbers(step, rows))

    def numbers(self, step: int, rows: np.ndarray | None) -> np.ndarray:
        """Sample numbers, int64 [n], of the rows of a step; as in `batch`."""
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        return step * self.global_batch_size + (np.arange(self.global_batch_size) if rows is None else np.asarray(rows))

    def sample(self, number: int) -> Rows:
        """One row, without the leading axis: number = step * global_batch_size + row."""
        return {name: array[0] for name, array in self.samples(np.array([number])).items()}

    def samples(self, numbers: np.ndarray) -> Rows:
        """The rows of any sample numbers, int64 [n]."""
        chosen, own_numbers = self.order.pick(numbers)
        batch = empty_rows(self.spec, len(numbers))

        def fill(source: Source, places: np.ndarray) -> None:
            try:
                part = source.rows(own_numbers[places])
            except DamagedData as error:
                if self.damage is None or not (error.path.parent / MANIFEST).exists():  # nobody wants to do without all of it
                    raise
                if len(places) > 1:
                    for half in np.array_split(places, 2):
                        fill(source, half)
                else:
                    self.damage.add(error, int(numbers[places[0]]))
                return
            for name, array in part.items():
                batch[name][places] = array

        for source in self.sources:
            places = np.flatnonzero(chosen == source.number)
            if len(places):
                fill(source, places)
        return batch

    def examples(self, step: int, rows: np.ndarray | None = None) -> list[Example | None]:
        """What the rows of a step (as in `batch`) are made of, damaged or not; None for those after the end of a
        split."""
        chosen, own_numbers = self.order.pick(self.numbers(step, rows))
        found: list[Example | None] = [None] * len(chosen)
        for source in self.sources:
            places = np.flatnonzero(chosen == source.number)
            for place, example in zip(places.tolist(), source.examples(own_numbers[places]), strict=True):
                found[place] = example
        return found


def training_batches(corpora: Sequence[tuple[Corpus, float]], cut: Cut, *, batch_size: int, seed: int,
                     skip_damaged: bool = False) -> Batches:
    """Endless shuffled batches from the train splits, mixed in proportion to the weights.

    Raises:
      UserError: the tokenizers differ, or `cut` refuses a corpus.
    """
    weights = [weight for _, weight in corpora]
    sources = _sources([corpus for corpus, _ in corpora], cut, seed, training=True)
    return Batches(sources, Mixture(weights), weights, batch_size, skip_damaged)


def validation_batches(corpora: Sequence[Corpus], cut: Cut, *, batch_size: int, skip_damaged: bool = False) -> Batches:
    """The validation splits in order, each sequence once; the same masks and pairs each time. Errors as in
    `training_batches`."""
    sources = _sources(corpora, cut, VALIDATION_SEED, training=False)
    counts = [source.sequences.count for source in sources]
    return Batches(sources, Succession(counts), counts, batch_size, skip_damaged)


def _sources(corpora: Sequence[Corpus], cut: Cut, seed: int, training: bool) -> list[Source]:
    """One source for each corpus; UserError unless all of them can be used, and together."""
    first = corpora[0]
    for corpus in corpora[1:]:
        if corpus.tokenizer.digest != first.tokenizer.digest:
            raise UserError(f"data.corpus: {corpus.directory} and {first.directory} were prepared with different tokenizers; "
                            "the corpora of a mixture must share one")
    return [Source(str(corpus.directory), cut(corpus, training), number, seed, training) for number, corpus in enumerate(corpora)]


class BatchIterator:
    """Batches of consecutive steps, made ahead in background threads. Close it, or use it as a context manager."""

    def __init__(self, batches: Batches, start_step: int, stop_step: int, rows: np.ndarray | None, prefetch: int):
        import grain  # it imports JAX, which worker processes that only read this file's neighbours must not

        self.batches, self.rows = batches, rows
        self.steps = range(start_step, stop_step)
        options = grain.ReadOptions(num_threads=min(prefetch, MAX_READ_THREADS), prefetch_buffer_size=prefetch)
        self.iterator = iter(grain.MapDataset.source(self).to_iter_dataset(options))
        self.iterator.start_prefetch()

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Rows:
        return self.batches.batch(self.steps[index], self.rows)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Rows:
        """The next batch. What went wrong in the background is raised here."""
        return next(self.iterator)

    def close(self) -> None:
        """Stop the threads; harmless when repeated."""
        self.iterator.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def iterate(batches: Batches, start_step: int, stop_step: int, *, rows: np.ndarray | None = None,
            prefetch: int = 4) -> BatchIterator:
    """batch(start_step), ..., batch(stop_step - 1), each with these rows; `prefetch` of them are made ahead from now
    on."""
    return BatchIterator(batches, start_step, stop_step, rows, prefetch)
