"""jaxlm from Python: what the command line does, in as many lines.

    import jaxlm

    model = jaxlm.load("runs/mine")            # a run directory, or a Hugging Face folder
    model.generate("Once upon a time")
    model.export("mine-for-transformers")

Keys are those of a run file, written as on the command line: `jaxlm.load("runs/mine", "mesh.tensor=2")`.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import config
from jaxlm.data.sequences import start_token
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError
from jaxlm.interop.exporting import export_model, free_folder
from jaxlm.interop.importing import open_weights, read_params
from jaxlm.interop.source import about_place, open_source, settings_of
from jaxlm.interop.tokenizers import read_tokenizer
from jaxlm.models.model import Params
from jaxlm.parallel.rules import cutting
from jaxlm.planning.plan import Plan
from jaxlm.serving.predicting import Predictor
from jaxlm.serving.samples import make_sampler
from jaxlm.serving.sampling import make_generator
from jaxlm.settings import Settings
from jaxlm.storage.files import as_path, exists
from jaxlm.tasks.find import find_task
from jaxlm.training import run
from jaxlm.training.corpora import resolve
from jaxlm.training.setup import lay_mesh
from jaxlm.training.stages import of_checkpoint
from jaxlm.training.step import Trainer, dropless, start
from jaxlm.training.trained import opened

BATCH_SIZE = 32  # texts whose states are computed at a time
Pooling = Literal["mean", "first", "last"]
Text = str | tuple[str, str]  # one text, or a pair


def load_settings(path: str | Path, *overrides: str) -> Settings:
    """Those of a run file or a run directory, with `key=value` overrides. Raises UserError."""
    return config.load(path, overrides, about_place)


def train(what: Settings | str | Path, *overrides: str) -> dict[str, Any]:
    """Trains to the end, or goes on where an earlier call was stopped; returns what summary.json says.

    Args:
      what: the run's settings, or its run file or directory.
      overrides: `key=value`.

    Raises UserError, RunError, Preempted as `jaxlm.training.run.train` does.
    """
    return run.train(_settings(what, overrides), make_sampler, open_weights)


def plan(what: Settings | str | Path, target: str, *overrides: str, fast: bool = False) -> Plan:
    """Memory, traffic and time of a run's step on devices that are not here.

    Args:
      what: the run's settings, or its run file or directory.
      target: for example h100:8x8, v5p:4x4x4, v5e-256.
      overrides: `key=value`.
      fast: an estimate, without the target's compiler.

    Raises UserError.
    """
    from jaxlm.planning.compiled_plan import compiled_plan
    from jaxlm.planning.estimated_plan import estimated_plan
    from jaxlm.planning.planned_stage import to_plan
    from jaxlm.planning.targets import find_target

    there = find_target(target)
    own, assumed = to_plan(_settings(what, overrides), there)
    made = (estimated_plan if fast else compiled_plan)(own, there)
    return made._replace(assumed=assumed)


def load(folder: str | Path, *overrides: str) -> "LoadedModel":
    """Opens a trained model: the newest good checkpoint of a run directory (or checkpoint.step), or a folder of
    transformers. Raises UserError."""
    if exists(as_path(folder) / "config.yaml"):
        own, mesh = lay_mesh(of_checkpoint(config.load(folder, overrides)))
        with opened(own, mesh) as trained:
            return LoadedModel(trained.trainer, trained.params(), trained.tokenizer, trained.step)
    source = open_source(str(folder))
    tokenizer = read_tokenizer(source.folder, source.foreign.model.vocab_size)
    own, mesh = lay_mesh(settings_of(str(folder), [f"run_dir={folder}", *overrides]))
    trainer = start(resolve(dropless(own), tokenizer), mesh)
    with jax.set_mesh(mesh):
        return LoadedModel(trainer, read_params(source, trainer)[0], tokenizer, 0)


class LoadedModel:
    """A trained model with its tokenizer, on the devices of its mesh.

    Attributes:
      settings: of its run, everything derived filled in.
      tokenizer: text to ids and back.
      step: the checkpoint's; 0 of a Hugging Face folder.
    """

    def __init__(self, trainer: Trainer, params: Params, tokenizer: Tokenizer, step: int):
        self.settings, self.tokenizer, self.step = trainer.settings, tokenizer, step
        self._trainer, self._params = trainer, params
        self._task = find_task(trainer.settings)
        self._compiled: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<jaxlm model: {self._task}, step {self.step} of {self.settings.run_dir}>"

    def encode(self, texts: str | Sequence[str], pooling: Pooling = "mean") -> np.ndarray:
        """Vectors of texts: float32 [N, hidden_size], of one text [hidden_size]. The mean over a text's tokens, or the
        state of the first ([CLS]) or the last one. Raises UserError for a text that is too long."""
        def pooled(network: Any, batch: dict[str, jax.Array]) -> jax.Array:
            real, states = batch["segment_ids"] > 0, network.states(batch)
            x = states.at(jnp.broadcast_to(jnp.arange(real.shape[1]), real.shape))[:, : real.shape[1]].astype(jnp.float32)
            if pooling == "mean":
                return (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
            return x[:, 0] if pooling == "first" else jnp.take_along_axis(x, batch["last_position"][:, None, None], 1)[:, 0]

        if pooling not in ("mean", "first", "last"):
            raise UserError(f"pooling={pooling}: expected mean, first or last")
        found = np.stack([row for row, _ in self._of_rows(f"encode {pooling}", pooled, _as_list(texts))])
        return found[0] if isinstance(texts, str) else found

    def logits(self, texts: str | Sequence[str]) -> list[np.ndarray] | np.ndarray:
        """What the first head says of texts: of a language model float32 [tokens, vocab_size], for each token of a text
        with what stands around it; of a classifier [classes]. Raises UserError for a text that is too long."""
        objective = self._trainer.model.objectives[0]

        def every_logit(network: Any, batch: dict[str, jax.Array]) -> jax.Array:
            return objective.every_logit(network, network.states(batch), batch)

        found = [row[:length] if row.ndim == 2 else row for row, length in self._of_rows("logits", every_logit, _as_list(texts))]
        return found[0] if isinstance(texts, str) else found

    def predict(self, texts: Text | Sequence[Text]) -> list[dict[str, Any]] | dict[str, Any]:
        """What a model with a task says of each text or pair of texts: `label` and `probabilities`, or `score`, as in
        predictions.jsonl. Raises UserError for a model without such a task."""
        if not self._task.answers_records:
            raise UserError(f"predict: {self._task} says nothing of a text; expected a model that was trained to, for example "
                            "with task.name=text_classification")
        alone = isinstance(texts, str | tuple)
        records = [(text,) if isinstance(text, str) else tuple(text) for text in ([texts] if alone else texts)]
        with jax.set_mesh(self._trainer.mesh):
            answers = list(Predictor(self._trainer, self._params, self.tokenizer).answers(records))
        return answers[0] if alone else answers

    def generate(self, prompts: str | Sequence[str] = "", **keys: Any) -> list[str] | str:
        """Continuations of prompts, without the prompts. `keys`: those of section `generate`, for example
        max_new_tokens=20, temperature=0.0; with num_samples those of a prompt follow each other. Raises UserError."""
        if not self._task.continues_text:
            raise UserError(f"generate: {self._task}: only models of task.name=causal_lm continue text")
        known = [field.name for field in dataclasses.fields(self.settings.generate)]
        for name in keys:
            if name not in known:
                raise UserError(f"generate: no key {name}; expected some of {', '.join(known)}")
        asked = dataclasses.replace(self.settings.generate, **{"prompts": _as_list(prompts), "num_samples": 1} | keys)
        trainer = self._trainer._replace(settings=dataclasses.replace(self.settings, generate=asked))
        with jax.set_mesh(trainer.mesh):
            samples = make_generator(trainer, self.tokenizer)(self._params)
        found = [sample.text for sample in samples]
        return found[0] if isinstance(prompts, str) and len(found) == 1 else found

    def export(self, folder: str | Path) -> None:
        """Makes a folder that transformers loads, and compares what it computes. Raises UserError, RunError."""
        out = free_folder(str(folder))
        exact = self._trainer.settings.train.precision == "float32"
        trainer = self._trainer if exact else start(_in_float32(self.settings), self._trainer.mesh)
        with jax.set_mesh(trainer.mesh):
            export_model(trainer, lambda: self._params, self.tokenizer, out, self.step)

    def _of_rows(self, name: str, function: Any, texts: list[str]) -> list[tuple[np.ndarray, int]]:
        """`function(network, batch)` [B, ...] of each text, and its number of tokens."""
        model, mesh, found = self._trainer.model, self._trainer.mesh, []
        if name not in self._compiled:
            self._compiled[name] = jax.jit(model.traced(lambda params, batch: function(model.bind(params), batch)),
                                           out_shardings=NamedSharding(mesh, PartitionSpec()))
        encoded = [self._tokens_of(text) for text in texts]
        for first in range(0, len(encoded), BATCH_SIZE):
            part = encoded[first : first + BATCH_SIZE]
            with jax.set_mesh(mesh):
                rows = np.asarray(self._compiled[name](self._params, self._batch(part, mesh)))
            found += [(row, len(ids)) for row, ids in zip(rows, part, strict=False)]
        return found

    def _tokens_of(self, text: str) -> list[int]:
        """With what stands around a text as the model has learned it."""
        ids, limit = self.tokenizer.encode(text), self.settings.model.max_length
        if self.settings.model.causal:
            start = start_token(self.tokenizer.special, self.settings.data.packing) if self.settings.data.start_token else None
            opened_by = [start] if start is not None and (self.settings.data.packing == "documents" or not ids) else []
            ids = opened_by + ids
        else:
            framing = self.tokenizer.framing
            ids = [*framing.start, *ids, *framing.end]
        if not 0 < len(ids) <= limit:
            raise UserError(f"a text of {len(ids):,} tokens; expected 1 to model.max_length={limit:,}: {text[:40]!r}")
        return ids

    def _batch(self, encoded: list[list[int]], mesh: Mesh) -> dict[str, np.ndarray]:
        """Rows padded to few different shapes, so that little is compiled."""
        ways = math.prod(mesh.shape[axis] for axis in cutting("batch")) * self.settings.train.gradient_accumulation
        longest = max(map(len, encoded))
        length = min(self.settings.model.max_length, 2 ** math.ceil(math.log2(max(longest, 2 * mesh.shape["context"], 8))))
        rows = math.ceil(2 ** math.ceil(math.log2(len(encoded))) / ways) * ways
        lengths = np.array([len(ids) for ids in encoded] + [1] * (rows - len(encoded)), np.int32)
        batch = {"tokens": np.full((rows, length), self.tokenizer.special.pad or 0, np.int32),
                 "segment_ids": (np.arange(length) < lengths[:, None]).astype(np.int32), "last_position": lengths - 1}
        for row, ids in zip(batch["tokens"], encoded, strict=False):
            row[: len(ids)] = ids
        return batch


def _settings(what: Settings | str | Path, overrides: Sequence[str]) -> Settings:
    if not isinstance(what, Settings):
        return load_settings(what, *overrides)
    if overrides:
        raise UserError("overrides are for a run file or a run directory; settings are changed with dataclasses.replace")
    return what


def _as_list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _in_float32(own: Settings) -> Settings:
    return dataclasses.replace(own, train=dataclasses.replace(own.train, precision="float32"))
