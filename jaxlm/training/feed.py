"""What the step is fed with: batches of the task's rows, made ahead and laid on the mesh."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.data.batches import Batches, iterate
from jaxlm.data.corpus import Corpus
from jaxlm.parallel.mesh import first_holders, rows_are_shared, rows_needed
from jaxlm.parallel.pipeline import num_stages
from jaxlm.parallel.rules import cutting
from jaxlm.parallel.sharding import abstract
from jaxlm.settings import Settings
from jaxlm.tasks.find import find_task
from jaxlm.training.step import PLACE, Batch, batch_sharding


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


def make_validation_batches(settings: Settings, corpora: list[tuple[Corpus, float]]) -> Batches | None:
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
