"""What every verb needs before it can start: corpus, devices, mesh, model, and batches on the devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.checks import check_kernel, check_layout
from jaxlm.console.progress import print_line
from jaxlm.data.batches import Batches, iterate
from jaxlm.data.changes import changes
from jaxlm.data.corpus import Corpus
from jaxlm.data.manifest import MANIFEST
from jaxlm.data.prepare import prepare, refuse_other_kind
from jaxlm.data.sequences import start_token
from jaxlm.data.stages import given_tokenizer
from jaxlm.data.tokenizers import Tokenizer, vocabulary_size
from jaxlm.errors import UserError, printable
from jaxlm.models.model import Model
from jaxlm.parallel.mesh import first_holders, make_mesh, rows_are_shared, rows_needed
from jaxlm.parallel.pipeline import num_stages
from jaxlm.parallel.rules import cutting, shrunk
from jaxlm.parallel.sharding import abstract
from jaxlm.runtime import processes, runtime_log
from jaxlm.settings import BUILT_IN_TOKENIZERS, TRAINED_TOKENIZERS, Settings, flatten, to_dict
from jaxlm.storage.files import as_path, exists
from jaxlm.tasks.find import find_task
from jaxlm.training.footprint import logits_memory
from jaxlm.training.length import with_steps
from jaxlm.training.step import PLACE, Batch, Trainer, batch_sharding, make_trainer

Corpora = list[tuple[Corpus, float]]


def lay_mesh(settings: Settings) -> tuple[Settings, Mesh]:
    """Joins the other processes of this run and lays the mesh over the devices of all: `join`, then `lay`."""
    return lay(settings, join(settings))


def join(settings: Settings) -> list[jax.Device]:
    """The devices of all processes of this run, once they have found each other. Raises UserError."""
    runtime_log.divert(settings)
    devices = processes.initialize(settings.devices)
    processes.refuse_differences(flatten(to_dict(settings)))
    return devices


def lay(settings: Settings, devices: list[jax.Device]) -> tuple[Settings, Mesh]:
    """The mesh over devices, and the settings: with mesh.elastic they follow the devices that are there. Raises
    UserError for what does not fit."""
    if settings.mesh.elastic:
        smaller, times = shrunk(settings.mesh, len(devices))
        train = dataclasses.replace(settings.train, gradient_accumulation=times * settings.train.gradient_accumulation)
        settings = dataclasses.replace(settings, mesh=smaller, train=train)
    mesh = make_mesh(settings.mesh, devices)
    check_layout(settings, mesh.shape)
    check_kernel(settings, mesh.devices.flat[0].platform)
    return settings, mesh


def start(settings: Settings, mesh: Mesh, schedule: optax.Schedule | None = None) -> Trainer:
    """Builds the model's functions on the mesh; `model.vocab_size` is known by now (see `resolve`). `schedule`: of the
    learning rate; None: by the settings alone."""
    device = mesh.devices.flat[0]
    memory = logits_memory(settings, mesh.shape, device.platform, device.device_kind)
    model = Model(settings.model, settings.train, find_task(settings).objectives(), memory)
    return make_trainer(model, settings, mesh, schedule)


def dropless(settings: Settings) -> Settings:
    """The same without `model.capacity_factor`, which is for training: what is generated or measured must not depend on
    the batch that it is in."""
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, capacity_factor=None))


# ---- corpora ---------------------------------------------------------------------------------------------------------

def open_corpora(settings: Settings, accept: Callable[[Corpora], object] = lambda corpora: None,
                 notes: bool = True) -> Corpora:
    """Opens the corpus or the mixture; one that does not exist yet is prepared from data.raw.

    Says on stderr where data.raw has changed since an earlier preparation.

    Every process may call this: one prepares, those that share its file system wait, those that do not prepare the same
    bytes for themselves.

    Args:
      settings: of the run.
      accept: raises UserError for corpora that this run cannot use; what has just been prepared is then removed again.
      notes: print what a user would not expect of a text that has just been prepared (`Corpus.describe` has it, too).
    """
    if isinstance(settings.data.corpus, dict):
        whole = settings.data.damaged == "stop"
        corpora = [(Corpus(folder, whole), weight) for folder, weight in settings.data.corpus.items()]
        for corpus, _ in corpora:
            refuse_other_kind(corpus, settings.task)
        accept(corpora)
        return corpora
    folder = as_path(settings.data.corpus or as_path(settings.run_dir) / "corpus")
    is_new = not exists(folder / MANIFEST)
    if is_new:
        check_given_tokenizer(settings)
    corpus = prepare(settings.data, folder, vocab_size=settings.model.vocab_size, accept=lambda corpus: accept([(corpus, 1.0)]),
                     task=settings.task)
    if processes.place()[0] == 0:
        for line in (corpus.notes if notes else []) if is_new else changes(corpus, settings.data):
            print_line(printable(f"note: {line}"))
    return [(corpus, 1.0)]


def check_given_tokenizer(settings: Settings) -> None:
    """Refuses a tokenizer that the model cannot use, before hours are spent on a corpus. Raises UserError."""
    tokenizer = given_tokenizer(settings.data)
    if tokenizer:
        resolve(settings, tokenizer)
        find_task(settings).check_tokenizer(tokenizer, f"data.tokenizer={settings.data.tokenizer}")


def check_corpora(settings: Settings, corpora: Corpora) -> None:
    """Refuses corpora that this run cannot be trained on, evaluated on, or continue its prompts with. Raises
    UserError."""
    settings = settled(settings, corpora)
    with_steps(settings, make_training_batches(settings, corpora))
    make_validation_batches(settings, corpora)
    task = find_task(settings)
    if task.best and task.continues_text:
        encode_prompts(settings, corpora[0][0].tokenizer)


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


# ---- batches ---------------------------------------------------------------------------------------------------------

def micro_batch_size(settings: Settings) -> int:
    """Sequences whose activations are on all devices together at a time."""
    return settings.data.global_batch_size // settings.train.gradient_accumulation


def evaluation_batch_size(settings: Settings) -> int:
    """Sequences in one batch of an evaluation; a pipeline takes at least one micro-batch for each stage."""
    return settings.eval.batch_size or micro_batch_size(settings) * num_stages()


def batch_shapes(settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every array of a training batch, known without a corpus."""
    rows = settings.data.global_batch_size
    return {name: jax.ShapeDtypeStruct((rows, *field.shape), field.dtype) for name, field in find_task(settings).spec().items()}


def abstract_batch(settings: Settings, mesh: Mesh) -> Batch:
    """What the step takes beside the state, as shapes on the mesh; of a run with train.hours also its place in the
    schedule."""
    shapes = batch_shapes(settings)
    batch = abstract(shapes, dict.fromkeys(shapes, batch_sharding(mesh)))
    if settings.train.hours is not None:
        batch |= {PLACE: jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))}
    return batch


def place_in_schedule(place: float, mesh: Mesh) -> Batch:
    """The array that a step of a run with train.hours takes beside its rows."""
    value = np.asarray(place, np.float32)
    return {PLACE: jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda index: value[index])}


def make_training_batches(settings: Settings, corpora: Corpora) -> Batches:
    """`batch(step)` of the whole run."""
    return find_task(settings).training_batches(corpora)


def make_validation_batches(settings: Settings, corpora: Corpora) -> Batches | None:
    """The validation set, once through, padded to whole batches; None when nothing is held out."""
    return find_task(settings).validation_batches([corpus for corpus, _ in corpora], evaluation_batch_size(settings))


# Two buffers hide two waits. Threads read and cut text (`iterate`), `prefetch` batches ahead, so that a slow disk
# is felt only when it is slow for longer than that many steps. And copying to the devices, which is asynchronous
# like a step, is begun one batch early: when batch n is handed out, n + 1 is on its way and has the whole of step n
# to arrive. One is enough: a copy takes less time than a step, and each further one would cost its memory on the
# devices.
#
#     threads      cut 7, 8, 9 ...
#     ahead()      place 6  -> yield 5  | place 7  -> yield 6  | ...
#     devices      step 4              | step 5              | ...
#
# A process reads only the rows that its own devices hold: `rows` are their numbers in the global batch, and
# batch(step) is a pure function of the step and of those, so that no process has to tell another what it read, and
# a resumed run begins at `start_step` without having to skip what came before.
@contextlib.contextmanager
def on_devices(batches: Batches, start_step: int, stop_step: int, mesh: Mesh, prefetch: int) -> Iterator[Iterable[Batch]]:
    """Batches `start_step` to `stop_step` on the mesh; the next one is on its way before the current one is asked
    for."""
    sharding = batch_sharding(mesh)
    rows = rows_needed(sharding, batches.global_batch_size)
    skipping = batches.damage is not None and rows_are_shared(sharding, batches.global_batch_size)
    agree = _as_first_holders_read(sharding) if skipping else lambda batch: batch

    def place(batch: dict[str, np.ndarray]) -> Batch:
        return agree({name: _place(array, rows, batches.global_batch_size, sharding) for name, array in batch.items()})

    def ahead(host: Iterator[dict[str, np.ndarray]]) -> Iterator[Batch]:
        following = next(host, None)
        following = following and place(following)
        while following is not None:
            current, following = following, next(host, None)
            following = following and place(following)
            yield current

    with contextlib.closing(iterate(batches, start_step, stop_step, rows=rows, prefetch=prefetch)) as host:
        yield ahead(iter(host))


def _place(array: np.ndarray, rows: np.ndarray, num_rows: int, sharding: NamedSharding) -> jax.Array:
    """This process's rows of a batch, as a part of the global array."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        first, last = index[0].indices(num_rows)[:2]
        begin = np.searchsorted(rows, first)
        return array[begin : begin + last - first]

    return jax.make_array_from_callback((num_rows, *array.shape[1:]), sharding, part)


@functools.cache
def _as_first_holders_read(sharding: NamedSharding) -> Callable[[Batch], Batch]:
    """Gives all devices that hold a row what the first of them has.

    Of two processes with copies of a corpus of their own, one may have to skip a row that the other can read.
    """
    copies = tuple(axis for axis in sharding.mesh.axis_names if axis not in cutting("batch"))

    def as_first_read(array: jax.Array) -> jax.Array:
        is_first = sum(jax.lax.axis_index(axis) for axis in copies) == 0
        return jax.lax.psum(jnp.where(is_first, array, 0).astype(jnp.int32), copies).astype(array.dtype)

    each = jax.shard_map(lambda batch: jax.tree.map(as_first_read, batch), mesh=sharding.mesh, in_specs=sharding.spec,
                         out_specs=sharding.spec, check_vma=False)
    return jax.jit(each, out_shardings=sharding)


class SkippedRows(NamedTuple):
    """Counts the rows that data.damaged=skip has made padding, in all processes: all of them must ask."""

    batches: Batches
    mesh: Mesh
    earlier: int = 0  # before the step that this process resumed from
    start: int = 0  # the step before the first of `batches`

    def count(self, steps: int) -> int:
        """Up to this step of the run."""
        if self.batches.damage is None:
            return self.earlier
        rows = self.batches.damage.samples((steps - self.start) * self.batches.global_batch_size) % self.batches.global_batch_size
        own = first_holders(batch_sharding(self.mesh), self.batches.global_batch_size)[rows] == jax.process_index()
        return self.earlier + int(process_allgather(np.int32(np.count_nonzero(own))).sum())

    def column(self, steps: int, name: str = "skipped_rows") -> dict[str, int]:
        """A column of metrics.jsonl, which is left out where nothing was skipped."""
        count = self.count(steps)
        return {name: count} if count else {}
