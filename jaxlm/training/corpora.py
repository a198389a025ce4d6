"""The corpora of a run: opened or prepared, checked against the model, and what they decide of its settings."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from jaxlm.console.progress import print_line
from jaxlm.data.batches import Batches
from jaxlm.data.changes import changes
from jaxlm.data.corpus import Corpus
from jaxlm.data.manifest import MANIFEST
from jaxlm.data.prepare import prepare, refuse_other_kind
from jaxlm.data.sequences import start_token
from jaxlm.data.stages import given_tokenizer
from jaxlm.data.tokenizers import Tokenizer, vocabulary_size
from jaxlm.errors import UserError, printable
from jaxlm.runtime import processes
from jaxlm.settings import BUILT_IN_TOKENIZERS, TRAINED_TOKENIZERS, Settings
from jaxlm.storage.files import as_path, exists
from jaxlm.tasks.find import find_task
from jaxlm.training.feed import make_validation_batches
from jaxlm.training.length import with_steps

Corpora = list[tuple[Corpus, float]]
T = TypeVar("T")


class Opened(NamedTuple):
    """Corpora that a run can be trained on, and what it makes of them."""

    settings: Settings  # with what the corpora decide: vocabulary, labels, steps
    corpora: Corpora
    training: Batches  # `batch(step)` of the whole run
    validation: Batches | None  # the validation set, once through; None: nothing is held out


def open_corpora(settings: Settings, use: Callable[[Corpora], T], notes: bool = True) -> T:
    """Opens the corpus or the mixture, and gives what `use` makes of it. One that does not exist yet is prepared from
    data.raw.

    Says on stderr where data.raw has changed since an earlier preparation.

    Every process may call this: one prepares, those that share its file system wait, those that do not prepare the same
    bytes for themselves.

    Args:
      settings: of the run.
      use: raises UserError for corpora that this run cannot use; what has just been prepared is then removed again.
      notes: print what a user would not expect of a text that has just been prepared (`Corpus.describe` has it, too).
    """
    if isinstance(settings.data.corpus, dict):
        whole = settings.data.damaged == "stop"
        corpora = [(Corpus(folder, whole), weight) for folder, weight in settings.data.corpus.items()]
        for corpus, _ in corpora:
            refuse_other_kind(corpus, settings.task)
        return use(corpora)
    folder = as_path(settings.data.corpus or as_path(settings.run_dir) / "corpus")
    is_new = not exists(folder / MANIFEST)
    if is_new:
        check_given_tokenizer(settings)
    corpus, used = prepare(settings.data, folder, lambda corpus: (corpus, use([(corpus, 1.0)])),
                           vocab_size=settings.model.vocab_size, task=settings.task)
    if processes.place()[0] == 0:
        for line in (corpus.notes if notes else []) if is_new else changes(corpus, settings.data):
            print_line(printable(f"note: {line}"))
    return used


def check_given_tokenizer(settings: Settings) -> None:
    """Refuses a tokenizer that the model cannot use, before hours are spent on a corpus. Raises UserError."""
    tokenizer = given_tokenizer(settings.data)
    if tokenizer:
        resolve(settings, tokenizer)
        find_task(settings).check_tokenizer(tokenizer, f"data.tokenizer={settings.data.tokenizer}")


def usable(settings: Settings, corpora: Corpora) -> Opened:
    """Refuses corpora that this run cannot be trained on, evaluated on, or continue its prompts with. Raises
    UserError."""
    settings = settled(settings, corpora)
    training = find_task(settings).training_batches(corpora)
    settings = with_steps(settings, training)
    opened = Opened(settings, corpora, training, make_validation_batches(settings, corpora))
    task = find_task(settings)
    if task.best and task.continues_text:
        encode_prompts(settings, corpora[0][0].tokenizer)
    return opened


def encode_prompts(settings: Settings, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of `generate.prompts`, as training has them: after the start token where it opens every document.

    An empty prompt is what a document begins after (`start_token`), or token 0 where the tokenizer has nothing of
    the kind. Raises UserError if one does not fit.
    """
    data, limit = settings.data, settings.model.max_length
    start = start_token(tokenizer.special, data.packing)
    opening = [start] if data.packing == "documents" and data.start_token and start is not None else []
    encoded = []
    for prompt in settings.generate.prompts:
        shown = f"generate.prompts: {prompt if len(prompt) < 34 else prompt[:30] + '...'!r}"
        try:
            ids = opening + tokenizer.encode(prompt) or [0 if start is None else start]
        except UserError as error:
            raise UserError(f"{shown}: {error}") from None
        if len(ids) >= limit:
            raise UserError(f"{shown} is {len(ids)} tokens long; expected fewer than model.max_length={limit}")
        encoded.append(ids)
    return encoded


def settled(settings: Settings, corpora: Corpora) -> Settings:
    """With what the corpora decide: vocabulary and labels. Raises UserError."""
    return find_task(resolve(settings, corpora[0][0].tokenizer)).filled([corpus for corpus, _ in corpora])


def resolve(settings: Settings, tokenizer: Tokenizer) -> Settings:
    """Fills in what the tokenizer decides. Raises UserError when the model's vocabulary is not the tokenizer's."""
    given = settings.data.tokenizer not in TRAINED_TOKENIZERS + BUILT_IN_TOKENIZERS
    size = vocabulary_size(settings.model.vocab_size, tokenizer, given)
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, vocab_size=size))
