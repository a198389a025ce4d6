"""A folder of transformers, opened, and the settings of the run that it becomes. No JAX: a folder that is refused is
refused at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlm import config
from jaxlm.data.tokenizers import RUN_FILE
from jaxlm.errors import UserError, nearest
from jaxlm.interop.configuration import CONFIG, Foreign, decisive, read_configuration
from jaxlm.interop.names import head_is_there
from jaxlm.interop.safetensors import Tensor, open_weights
from jaxlm.interop.tokenizers import read_tokenizer
from jaxlm.settings import Settings
from jaxlm.storage.files import Location, as_path, exists, names_in

TOKENIZER = "tokenizer"  # folder in the run directory
LENGTH = 1024  # tokens of a sequence, where the model can take as many
TASKS = {("next_token",): "causal_lm", ("masked_token",): "masked_lm", ("masked_token", "next_sentence"): "bert",
         ("classification",): "text_classification", ("regression",): "text_classification"}


class Source(NamedTuple):
    """A folder of transformers, opened: headers are read and numbers are not."""

    folder: Location
    foreign: Foreign
    tensors: dict[str, Tensor]

    @property
    def heads(self) -> tuple[str, ...]:
        return self.foreign.heads or ()


def open_source(folder: str) -> Source:
    """Raises UserError, in one line, for whatever is no model of a known family."""
    path = as_path(folder)
    if not exists(path):
        beside = [str(path.parent / name) for name in names_in(path.parent)]
        raise UserError(f"{folder}: no such folder{nearest(str(path), beside)}; a model of the Hugging Face hub is downloaded "
                        "first: hf download NAME --local-dir FOLDER")
    if not names_in(path):
        raise UserError(f"{folder}: expected a folder with {CONFIG} and model.safetensors")
    if not exists(path / CONFIG):
        raise UserError(f"{folder}: no {CONFIG}; expected a folder that transformers has saved")
    foreign, tensors = read_configuration(path), open_weights(path)
    return Source(path, _with_heads(foreign, tensors), tensors)


def _with_heads(foreign: Foreign, tensors: dict[str, Tensor]) -> Foreign:
    """The heads that the weights have: where config.json names no class, and where the files have more than the class
    that it names (BertForMaskedLM, saved with the head for next sentences)."""
    family = foreign.family
    there = [heads for heads in family.heads.values() if all(head_is_there(family, head, tensors) for head in heads)]
    wider = [heads for heads in there if set(heads) >= set(foreign.heads or ())]
    if foreign.heads is None or (foreign.heads and wider):
        heads = max(wider, key=len, default=())
        if foreign.heads is None and foreign.model.causal and not heads and foreign.model.tied_embeddings:
            heads = ("next_token",)
        if heads == ("classification",) and foreign.problem == "regression":
            heads = ("regression",)
        foreign = foreign._replace(heads=heads)
    model = dataclasses.replace(foreign.model, next_sentence="next_sentence" in foreign.heads)
    return foreign._replace(model=model)


def is_run(place: str) -> bool:
    """Whether a folder is a run directory; a folder of transformers has no config.yaml."""
    return exists(as_path(place) / RUN_FILE)


def about_place(place: str) -> config.Origin:
    """What `init` says of a run that begins with it: a run directory, or a folder of transformers."""
    if is_run(place) or not exists(as_path(place) / CONFIG):
        return config.about_run(place)
    model = open_source(place).foreign.model
    return config.Origin(dataclasses.asdict(model), place, min(LENGTH, model.max_length))


def task_of(foreign: Foreign) -> dict[str, Any]:
    """Keys of the task that a model with these heads has learnt."""
    name = TASKS.get(foreign.heads or ())
    if name != "text_classification":
        return {"name": name}
    problem = foreign.problem or "single_label"
    return {"name": name, "problem": problem, "labels": None if problem == "regression" else list(foreign.labels)}


def import_settings(folder: str, overrides: Sequence[str]) -> Settings:
    """Those of the run that is to be made. Raises UserError."""
    if not any(word.startswith("run_dir=") for word in overrides):
        raise UserError("import: run_dir=RUN is missing: the run directory to make")
    return settings_of(folder, overrides)


def settings_of(folder: str, overrides: Sequence[str] = ()) -> Settings:
    """A run's settings, from config.json and `key=value` words. Raises UserError."""
    source = open_source(folder)
    foreign = source.foreign
    values = {"model": dataclasses.asdict(foreign.model), "task": task_of(foreign),
              "data": {"sequence_length": min(LENGTH, foreign.model.max_length)}}
    if foreign.model.causal and read_tokenizer(source.folder, foreign.model.vocab_size).framing.start:
        values["data"]["packing"] = "documents"  # texts begin with a start token: what comes next is to be prompted so
    settings = config.made_of(values, overrides, folder)
    was, now = decisive(foreign.model), decisive(settings.model)
    for key, value in was.items():
        if now[key] != value:
            raise UserError(f"model.{key}={now[key]}: {source.folder / CONFIG} says {value}; an import changes no model")
    tokenizer = settings.data.tokenizer
    if tokenizer == Settings().data.tokenizer:
        tokenizer = str(as_path(settings.run_dir) / TOKENIZER)
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, tokenizer=tokenizer))
