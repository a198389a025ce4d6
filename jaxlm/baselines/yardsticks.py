"""What n-grams make of the validation batches of a run: figures to hold a model's against.

Counted on the train splits, and asked for the same tokens as the model, with no more before them than the row of the
batch shows it: contexts end where a row or, with packing=documents, a document begins. A masked model sees both
sides of a token, which no n-gram does; beside it stands how often each token occurs at all.
"""

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxlm.baselines.kneser_ney import KneserNey
from jaxlm.baselines.ngrams import Scratch, chunks
from jaxlm.console.progress import optional, print_line, waiting
from jaxlm.console.units import counted
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import Corpus, Documents, bytes_per_token
from jaxlm.data.damage import DamagedData
from jaxlm.data.sequences import start_token
from jaxlm.data.shards import BLOCK_TOKENS
from jaxlm.settings import DataSettings, to_dict
from jaxlm.storage.files import exists, make_folder, read_text, write_json

ORDER = 5
VERSION = 1  # of the figures: another one is counted anew
FOLDER = "baseline"  # in a corpus

Figures = dict[str, dict[str, float | None]]  # yardstick -> figure -> value


def yardsticks(train: Sequence[Corpus], validation: Sequence[Corpus], batches: Batches, data: DataSettings) -> Figures:
    """Figures of `batches`, the validation set once through: for each order loss (nats per token), perplexity and
    bits_per_byte (null where the tokenizer lost text); of a masked model loss, perplexity and accuracy.

    Kept in the folder of the first corpus, so that the next model on the same text has them at once.

    Raises DamagedData: text of the train splits cannot be read, and data.damaged is not skip.
    """
    kept = train[0].directory / FOLDER / f"{_key(train, validation, batches, data)}.json"
    if exists(kept):
        return json.loads(read_text(kept))
    with tempfile.TemporaryDirectory() as folder, waiting("counting n-grams of the train split"):
        masked = "masked_targets" in batches.spec
        figures = (_masked if masked else _next_token)(train, validation, batches, data, Scratch(Path(folder)))
    if data.damaged == "skip":  # what is skipped today may be there again tomorrow
        return figures
    with optional(f"the figures are not kept in {kept.parent}, and counted anew the next time"):
        make_folder(kept.parent)
        write_json(kept, figures)
    return figures


def _key(train: Sequence[Corpus], validation: Sequence[Corpus], batches: Batches, data: DataSettings) -> str:
    """The same for the same text, cut into the same rows."""
    rows = {name: value for name, value in to_dict(data).items()
            if name in ("sequence_length", "packing", "start_token", "masking")}
    arrays = {name: [list(field.shape), str(field.dtype)] for name, field in batches.spec.items()}
    content = [VERSION, ORDER, [corpus.digest for corpus in train], [corpus.digest for corpus in validation], rows, arrays]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ---- models of the next token ----------------------------------------------------------------------------------------

def _next_token(train: Sequence[Corpus], validation: Sequence[Corpus], batches: Batches, data: DataSettings, scratch: Scratch
                ) -> Figures:
    tokenizer = train[0].tokenizer
    start = start_token(tokenizer.special, data.packing) if data.start_token else None
    length = sum(corpus.train.num_tokens + corpus.train.num_documents for corpus in train)
    model = KneserNey(sequences(train, data.packing, start, data.damaged == "skip"), length, tokenizer.vocab_size, ORDER, scratch)
    if note := model.note():
        print_line(f"note: {note}")
    losses = np.zeros(ORDER)
    count = 0
    for step in range(len(batches)):
        batch = batches.batch(step)
        mask = batch["loss_mask"]
        history = histories(batch["tokens"], batch.get("segment_ids"), ORDER - 1)
        losses -= np.log(model.probabilities(history[mask], batch["targets"][mask])).sum(axis=1)
        count += int(mask.sum())
    per_token = bytes_per_token(validation)
    return {f"n-gram ({n})": {"loss": loss, "perplexity": math.exp(loss),
                              "bits_per_byte": per_token and loss / math.log(2) / per_token}
            for n, loss in enumerate((losses / max(count, 1)).tolist(), 1)}


def sequences(corpora: Sequence[Corpus], packing: str, start: int | None, skip_damaged: bool = False
              ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The train splits as a stream for `jaxlm.baselines.ngrams`: documents after their start token, or (packing=
    concatenate) each split as one sequence. Behind damaged text, where that is skipped, a sequence begins."""
    for documents in (corpus.train for corpus in corpora):
        expected = -1
        read = itertools.chain.from_iterable(_read(documents, part, skip_damaged) for part in chunks(documents.num_tokens))
        for position, tokens in read:
            begins = np.zeros(len(tokens), bool)
            begins[0], expected = position != expected, position + len(tokens)
            if packing == "documents":
                first, last = np.searchsorted(documents.offsets, [position, expected])
                places = documents.offsets[first:last] - position
                if start is not None:
                    begins[places] = False  # the start token is seen first
                    tokens, begins = np.insert(tokens, places, start), np.insert(begins, places, True)
                else:
                    begins[places] = True
            yield tokens, begins


def _read(documents: Documents, part: slice, skip_damaged: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Positions and tokens of what can be read of a part of a stream; what is skipped is said, block by block. Raises
    DamagedData where damaged text is not to be skipped."""
    try:
        yield part.start, documents.read(part.start, part.stop)
    except DamagedData as error:
        if not skip_damaged:
            raise
        if part.stop - part.start <= BLOCK_TOKENS:
            print_line(f"{error.path}: {error.problem}; {counted(part.stop - part.start, 'token')} of it not counted")
            return
        middle = (part.start + part.stop) // 2
        for half in (slice(part.start, middle), slice(middle, part.stop)):
            yield from _read(documents, half, skip_damaged)


def histories(tokens: np.ndarray, segment_ids: np.ndarray | None, size: int) -> np.ndarray:
    """int32 [B, T, size]: at each position of rows (int [B, T]) its own token and those before it, the nearest
    first; -1 where the row or the segment has no more."""
    found = np.full((*tokens.shape, size), -1, np.int32)
    for back in range(min(size, tokens.shape[1])):
        here, before = slice(back, None), slice(None, tokens.shape[1] - back)
        found[:, here, back] = tokens[:, before]
        if segment_ids is not None:
            found[:, here, back][segment_ids[:, here] != segment_ids[:, before]] = -1
    return found


# ---- masked models ---------------------------------------------------------------------------------------------------

def _masked(train: Sequence[Corpus], validation: Sequence[Corpus], batches: Batches, data: DataSettings, scratch: Scratch
            ) -> Figures:
    """Of tokens that can be masked: special ones are left out of the counts."""
    tokenizer = train[0].tokenizer
    special = sorted(tokenizer.special.ids)
    words = (tokens[~np.isin(tokens, special)] for tokens, _ in sequences(train, "concatenate", None, data.damaged == "skip"))
    stream = ((tokens, np.zeros(len(tokens), bool)) for tokens in words)
    model = KneserNey(stream, sum(corpus.train.num_tokens for corpus in train), tokenizer.vocab_size, 1, scratch)
    each = model.probabilities(np.zeros((tokenizer.vocab_size, 0), int), np.arange(tokenizer.vocab_size))[0]
    loss, correct, count = 0.0, 0, 0
    for step in range(len(batches)):
        batch = batches.batch(step)
        targets = batch["masked_targets"][batch["masked_mask"]]
        loss -= float(np.log(each[targets]).sum())
        correct += int((targets == each.argmax()).sum())
        count += len(targets)
    loss /= max(count, 1)
    return {"unigram": {"loss": loss, "perplexity": math.exp(loss), "accuracy": correct / max(count, 1)}}
