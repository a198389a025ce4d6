"""Batches: pure functions of (corpora, seed, step), whoever asks for them, from whatever step on.

Row r of step s is sample s * global_batch_size + r of an endless sequence. A sample number leads to a corpus of the
mixture and a number in it, that to an epoch and a place, and that, through the epoch's permutation, to one sequence
of the corpus.

Arrays, int32 unless said (B rows, T = data.sequence_length, P predictions):
- gpt: tokens, targets [B, T], loss_mask bool [B, T].
- bert: tokens [B, T], masked_positions, masked_targets [B, P], masked_mask bool [B, P]; with next_sentence also
  token_types [B, T], next_sentence [B] (0: B follows A) and next_sentence_mask bool [B].
- segment_ids (1, 2, ... for the documents of a row, 0: padding) and positions [B, T] where a row can hold several
documents
  (packing=documents) or, for bert, padding (next_sentence, validation).

A row whose text is damaged ends the run, or (data.damaged=skip) is padding with masks that are all False; the others
stay as they are.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np

from jaxlm.data.corpus import Corpus
from jaxlm.data.damage import Damage, DamagedData
from jaxlm.data.manifest import MANIFEST
from jaxlm.data.masking import Masker, num_predictions
from jaxlm.data.randomness import make_keys, shuffled
from jaxlm.data.sequences import (
    BertDocuments,
    BertPairs,
    BertWindows,
    GptDocuments,
    GptWindows,
    Rows,
    Sequences,
    Spec,
    empty_rows,
    row_spec,
    start_token,
)
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings

MIXTURE_PERIOD = 2**16  # weights are rounded to multiples of its inverse
VALIDATION_SEED = 0  # masks and pairs are the same at each evaluation, of whichever run
ORDER, OFFSET, SAMPLE, MASK, VALIDATION = range(5)  # what a key is for
MAX_READ_THREADS = 4
MASKED = ("masked_positions", "masked_targets", "masked_mask")


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

    def rows(self, numbers: np.ndarray) -> tuple[Rows, np.ndarray]:
        """The samples `numbers` (int64 [n]) of this source and their keys (uint64 [n]). Raises DamagedData."""
        epochs, indices = self.places(numbers)
        epoch_keys, keys = self.keys(numbers, epochs)
        return self.sequences.rows(indices, epoch_keys, keys), keys

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
                 masker: Masker | None, pad: int, skip_damaged: bool):
        self.sources, self.order, self.masker, self.pad = sources, order, masker, pad
        self.damage = Damage() if skip_damaged else None
        self.global_batch_size = global_batch_size
        self.sequences_per_epoch = sum(source.sequences.count for source in sources)  # with several corpora: of all together
        self.padding_share = float(np.average([source.sequences.padding_share for source in sources], weights=shares))
        self.spec: Spec = dict(sources[0].sequences.spec)  # name -> (shape of one row, dtype)
        if masker:
            self.spec |= row_spec(masker.num_predictions, MASKED)

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
        batch = empty_rows(self.spec, len(numbers), self.pad)
        keys = np.zeros(len(numbers), np.uint64)
        filled = np.zeros((len(numbers), 1), bool)

        def fill(source: Source, places: np.ndarray) -> None:
            try:
                part, keys[places] = source.rows(own_numbers[places])
            except DamagedData as error:
                if self.damage is None or not (error.path.parent / MANIFEST).exists():  # nobody wants to do without all of it
                    raise
                if len(places) > 1:
                    for half in np.array_split(places, 2):
                        fill(source, half)
                else:
                    self.damage.add(error, int(numbers[places[0]]))
                return
            filled[places] = True
            for name, array in part.items():
                batch[name][places] = array

        for source in self.sources:
            places = np.flatnonzero(chosen == source.number)
            if len(places):
                fill(source, places)
        if self.masker:
            real = batch["segment_ids"] > 0 if "segment_ids" in batch else np.broadcast_to(filled, batch["tokens"].shape)
            batch |= self.masker(batch["tokens"], real, make_keys(MASK, keys))
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


def training_batches(corpora: Mapping[Corpus, float] | Sequence[tuple[Corpus, float]], data: DataSettings, *, family: str,
                     next_sentence: bool = False, seed: int) -> Batches:
    """Endless shuffled batches from the train splits, mixed in proportion to the weights.

    family: gpt or bert. UserError when the tokenizers differ or lack a token that is needed, or a split is too small.
    """
    corpora, weights = zip(*(corpora.items() if isinstance(corpora, Mapping) else corpora), strict=True)
    sources = make_sources(corpora, data, family, next_sentence, seed, training=True)
    masker, pad = masker_and_pad(corpora[0], data, family)
    return Batches(sources, Mixture(weights), weights, data.global_batch_size, masker, pad, data.damaged == "skip")


def validation_batches(corpora: Corpus | Sequence[Corpus], data: DataSettings, *, family: str, next_sentence: bool = False,
                       batch_size: int) -> Batches:
    """The validation splits in order, each target once; the same masks and pairs each time. Errors as in
    `training_batches`."""
    corpora = corpora if isinstance(corpora, Sequence) else [corpora]
    sources = make_sources(corpora, data, family, next_sentence, VALIDATION_SEED, training=False)
    counts = [source.sequences.count for source in sources]
    masker, pad = masker_and_pad(corpora[0], data, family)
    return Batches(sources, Succession(counts), counts, batch_size, masker, pad, data.damaged == "skip")


def masker_and_pad(corpus: Corpus, data: DataSettings, family: str) -> tuple[Masker | None, int]:
    masker = Masker(corpus.tokenizer, data.masking, data.sequence_length) if family == "bert" else None
    return masker, corpus.tokenizer.special.pad or 0


def make_sources(corpora: Sequence[Corpus], data: DataSettings, family: str, next_sentence: bool, seed: int,
                 training: bool) -> list[Source]:
    """One source for each corpus; UserError unless all of them can be used, and together."""
    first = corpora[0]
    for corpus in corpora[1:]:
        if corpus.tokenizer.digest != first.tokenizer.digest:
            raise UserError(f"data.corpus: {corpus.directory} and {first.directory} were prepared with different tokenizers; "
                            "the corpora of a mixture must share one")
    if family == "bert":
        check_special_tokens(first.tokenizer, str(first.directory))
        least = 5 if next_sentence else 3
        if data.sequence_length < least:
            raise UserError(f"data.sequence_length: {data.sequence_length} is too short for bert, expected at least {least}")
    return [Source(str(corpus.directory), cut(corpus, data, family, next_sentence, training), number, seed, training)
            for number, corpus in enumerate(corpora)]


def check_special_tokens(tokenizer: Tokenizer, where: str) -> None:
    """UserError unless the tokenizer has what BERT needs."""
    missing = [name for name in ("cls", "sep", "mask") if getattr(tokenizer.special, name) is None]
    if missing:
        raise UserError(f"{where}: the tokenizer has no {', '.join(missing)} token, which model.family=bert needs "
                        "(data.tokenizer=wordpiece trains one that has)")


def cut(corpus: Corpus, data: DataSettings, family: str, next_sentence: bool, training: bool) -> Sequences:
    """The sequences of one split, cut in the way that the settings name; UserError when there is none."""
    documents, special, length = corpus.train if training else corpus.validation, corpus.tokenizer.special, data.sequence_length
    problem = (f"{corpus.directory}: the {'train' if training else 'validation'} split has {documents.num_tokens:,} tokens in "
               f"{documents.num_documents:,} documents")
    kind = kind_of_sequences(data, family, next_sentence)
    start = start_token(special, data.packing) if data.start_token else None
    own = {GptWindows: [training], BertWindows: [training], GptDocuments: [start]}.get(kind, [])
    sequences = kind(documents, special, length, *own)
    if kind is BertPairs and sequences.num_documents < 2:
        raise UserError(f"{problem}; model.next_sentence=true needs at least 2 documents of 2 tokens or more "
                        "(data.document=line makes one of each line)")
    if not sequences.count:
        raise UserError(f"{problem}, too few for one sequence of data.sequence_length={length:,}; expected more text"
                        + (" or a shorter sequence" if documents.num_tokens > 1 else ""))
    return sequences


def kind_of_sequences(data: DataSettings, family: str, next_sentence: bool) -> type[Sequences]:
    """How the settings cut text into sequences."""
    if family == "bert" and next_sentence:
        return BertPairs
    if data.packing == "documents":
        return GptDocuments if family == "gpt" else BertDocuments
    return GptWindows if family == "gpt" else BertWindows


def batch_spec(data: DataSettings, family: str, next_sentence: bool) -> Spec:
    """What a row of a training batch holds, known without a corpus: name -> (shape, dtype)."""
    spec = row_spec(data.sequence_length, kind_of_sequences(data, family, next_sentence).ARRAYS)
    if family == "bert":
        spec |= row_spec(num_predictions(data.masking, data.sequence_length), MASKED)
    return spec


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
