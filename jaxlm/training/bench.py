"""`jaxlm bench`: the training step by itself, on random tokens."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from jaxlm.console.progress import print_line
from jaxlm.data.rows import Field
from jaxlm.errors import UserError
from jaxlm.reporting.memory import memory_of
from jaxlm.runtime.chips import products_peak
from jaxlm.settings import Settings
from jaxlm.stages import stages_of
from jaxlm.tasks.find import find_task
from jaxlm.training.feed import batch_shapes
from jaxlm.training.footprint import training_flops
from jaxlm.training.length import with_any_steps
from jaxlm.training.setup import lay_mesh
from jaxlm.training.step import Batch, batch_sharding, start


def bench(settings: Settings) -> dict[str, Any]:
    """Times `bench.steps` training steps, each waited for; of stages, those of the last. Needs no corpus. Raises
    UserError without model.vocab_size."""
    if settings.stages:
        print_line(f"timed is the last of the {len(settings.stages)} stages")
        settings = stages_of(settings)[-1]
    if settings.model.vocab_size is None:
        raise UserError("model.vocab_size: missing; bench makes up its tokens and has to know how many there are")
    settings, mesh = lay_mesh(with_any_steps(settings))
    trainer = start(settings, mesh)
    with jax.set_mesh(trainer.mesh):
        state = trainer.init(settings.seed)
        batch = random_batch(settings, trainer.mesh)
        started = time.monotonic()
        step = trainer.step.lower(state, batch).compile()
        compile_seconds = time.monotonic() - started
        times = []
        for _ in range(settings.bench.warmup_steps + settings.bench.steps):
            started = time.monotonic()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.monotonic() - started)
    seconds = statistics.median(times[settings.bench.warmup_steps :])
    length, rows = settings.data.sequence_length, settings.data.global_batch_size
    peak = products_peak(trainer.mesh.devices.flatten()[0].device_kind, settings.train.precision)
    flops = rows * training_flops(settings)
    return {
        "median_step_ms": 1e3 * seconds, "tokens_per_second": rows * length / seconds,
        "mfu": flops / seconds / (peak * trainer.mesh.size) if peak else None,
        "peak_memory_bytes": memory_of(step).total,
        "state_bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)),  # of one device
        "compile_seconds": compile_seconds, "devices": trainer.mesh.size, "mesh": dict(trainer.mesh.shape),
    }


def random_batch(settings: Settings, mesh: jax.sharding.Mesh) -> Batch:
    """A batch with the shapes and types of a real one: random tokens, nothing masked out, a document in each row."""
    random = np.random.default_rng(settings.seed)
    length, vocabulary = settings.data.sequence_length, settings.model.vocab_size

    def values(field: Field, shape: tuple[int, ...]) -> np.ndarray:
        if field.values in ("mask", "segment"):
            return np.ones(shape)
        if field.values == "position" and not field.shape:  # the last
            return np.full(shape, length - 1)
        if field.values == "position" and field.shape != (length,):  # some of them, in any order
            return np.argsort(random.random((shape[0], length)), axis=1)[:, : shape[1]]
        if field.values == "position":
            return np.broadcast_to(np.arange(length), shape)
        if field.values == "number":
            return random.normal(size=shape)
        return random.integers(0, field.bound or vocabulary, shape)

    shapes, spec = batch_shapes(settings), find_task(settings).spec()
    batch = {name: values(spec[name], leaf.shape).astype(leaf.dtype) for name, leaf in shapes.items()}
    return jax.device_put(batch, batch_sharding(mesh))
