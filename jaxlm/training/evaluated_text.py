"""On which text `jaxlm evaluate` evaluates: the run's own, another corpus, or other text, prepared with the run's
tokenizer."""

import dataclasses
import functools
import hashlib
import json
from typing import Any, NamedTuple

from jaxlm.console.units import counted
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import TOKENIZER
from jaxlm.data.manifest import MANIFEST
from jaxlm.data.sources import find_sources
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings, Settings
from jaxlm.storage.files import Location, as_path, exists
from jaxlm.training.corpora import Corpora, open_corpora, settled
from jaxlm.training.feed import make_validation_batches


class Evaluated(NamedTuple):
    """The text to evaluate a checkpoint on."""

    settings: Settings  # with what the corpora decide
    corpora: Corpora
    validation: Batches


def open_evaluated(settings: Settings, saved: dict[str, Any]) -> Evaluated:
    """The corpora to evaluate a checkpoint on; `saved` is what the checkpoint says of itself.

    data.corpus alone names a corpus that is there, and is taken as it was prepared. data.raw alone, or text as
    data.validation, is prepared into a folder of its own in run_dir, and all of it evaluated (of data.raw: unless
    data.validation says how much).

    Raises UserError: there is no such corpus, its tokenizer is not the run's, or it holds no validation text.
    """
    own, data = saved["settings"]["data"], settings.data
    if isinstance(data.validation, str) and data.validation != own["validation"] and data.raw == own["raw"]:
        data = dataclasses.replace(data, raw=data.validation)
    if data.corpus == own["corpus"] and data.raw in (None, own["raw"]):
        return open_corpora(settings, functools.partial(_usable, settings, saved))
    if isinstance(data.corpus, str) and data.raw == own["raw"]:
        if not exists(as_path(data.corpus) / MANIFEST):
            inside = as_path(data.corpus) / "corpus"
            near = f" (did you mean '{inside}'?)" if exists(inside / MANIFEST) else ""
            raise UserError(f"data.corpus={data.corpus}: no prepared corpus{near}; {_how_to_prepare(settings, own, data.corpus)}")
        data = dataclasses.replace(data, raw=None)
    elif data.raw is not None and data.tokenizer == own["tokenizer"]:
        data = _prepared_alike(settings, data, own, saved["tokenizer_digest"])
    settings = dataclasses.replace(settings, data=data)
    return open_corpora(settings, functools.partial(_usable, settings, saved))


def _prepared_alike(settings: Settings, data: DataSettings, own: dict[str, Any], digest: str) -> DataSettings:
    """How data.raw is prepared for the evaluation of a run: with its tokenizer, all of it held out, in a folder of
    its own."""
    # a run that was imported has no corpus yet, and its tokenizer where data.tokenizer says
    places = [_own_corpus(settings, own) / TOKENIZER, *([as_path(own["tokenizer"])] if exists(own["tokenizer"]) else [])]
    tokenizer = next((place for place in places if exists(place)), places[0])
    if not exists(tokenizer) or load_tokenizer(tokenizer).digest != digest:
        raise UserError(f"data.raw: the tokenizer of {settings.run_dir} is not in {tokenizer} any more; prepare the text with "
                        "data.tokenizer=FOLDER, where it is, and name what was made with data.corpus")
    if data.validation == own["validation"] and isinstance(data.raw, str):
        for file in find_sources(data.raw):  # what is not there is not there as data.raw
            if file.version is None:
                raise UserError(f"data.raw: {file.name} is a pipe, and evaluate reads a text twice; write it into a file first")
        data = dataclasses.replace(data, validation=data.raw)
    name = hashlib.sha256(json.dumps([data.raw, data.validation]).encode()).hexdigest()[:12]
    corpus = data.corpus if data.corpus != own["corpus"] else str(as_path(settings.run_dir) / "evaluated" / name)
    return dataclasses.replace(data, tokenizer=str(tokenizer), corpus=corpus)


def _usable(settings: Settings, saved: dict[str, Any], corpora: Corpora) -> Evaluated:
    """Refuses corpora that the checkpoint cannot be evaluated on. Raises UserError."""
    own, tokenizer = saved["settings"]["data"], corpora[0][0].tokenizer
    if tokenizer.digest != saved["tokenizer_digest"]:
        where = settings.data.corpus if isinstance(settings.data.corpus, str) else _own_corpus(settings, own)
        raise UserError(f"data.corpus={where}: prepared with another tokenizer (model.vocab_size={tokenizer.vocab_size}) than "
                        f"the model in {settings.run_dir} was trained with; {_how_to_prepare(settings, own, 'NEW')}")
    settings = settled(settings, corpora)
    validation = make_validation_batches(settings, corpora)
    if validation is None:
        raise UserError("data.validation: this corpus holds no validation text; prepare one with data.validation above 0")
    return Evaluated(settings, corpora, validation)


def _how_to_prepare(settings: Settings, own: dict[str, Any], corpus: str) -> str:
    return (f"jaxlm prepare {settings.run_dir} data.raw=TEXT data.corpus={corpus} "
            f"data.tokenizer={_own_corpus(settings, own) / TOKENIZER} makes one")


def _own_corpus(settings: Settings, own: dict[str, Any]) -> Location:
    """The folder, or the first, of the text that the run was trained on."""
    folder = next(iter(own["corpus"])) if isinstance(own["corpus"], dict) else own["corpus"]
    return as_path(folder or as_path(settings.run_dir) / "corpus")


def describe(corpora: Corpora) -> str:
    """What is evaluated on, in a line."""
    documents = sum(corpus.validation.num_documents for corpus, _ in corpora)
    tokens = sum(corpus.validation.num_tokens for corpus, _ in corpora)
    folders = ", ".join(str(corpus.directory) for corpus, _ in corpora)
    return f"evaluating on the validation text of {folders}: {counted(documents, 'document')}, {counted(tokens, 'token')}"
