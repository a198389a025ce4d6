"""`jaxlm bench`: the training step by itself, on random tokens."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from jaxlm.errors import UserError
from jaxlm.reporting.hardware import peak_flops
from jaxlm.settings import Settings
from jaxlm.training.setup import lay_mesh, start
from jaxlm.training.step import Batch, batch_sharding


def bench(settings: Settings) -> dict[str, Any]:
    """Times `bench.steps` training steps, each waited for. Needs no corpus. Raises UserError without model.vocab_size."""
    if settings.model.vocab_size is None:
        raise UserError("model.vocab_size: missing; bench makes up its tokens and has to know how many there are")
    run = start(settings, lay_mesh(settings))
    with jax.set_mesh(run.mesh):
        state = run.trainer.init(settings.seed)
        batch = random_batch(settings, run.mesh)
        started = time.monotonic()
        step = run.trainer.step.lower(state, batch).compile()
        compile_seconds = time.monotonic() - started
        times = []
        for _ in range(settings.bench.warmup_steps + settings.bench.steps):
            started = time.monotonic()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.monotonic() - started)
    seconds = statistics.median(times[settings.bench.warmup_steps :])
    length, rows = settings.data.sequence_length, settings.data.global_batch_size
    peak = peak_flops(run.mesh.devices.flatten()[0].device_kind)
    flops = rows * run.trainer.model.training_flops(length, batch.get("masked_positions", batch["tokens"]).shape[1])
    memory = step.memory_analysis()
    return {
        "median_step_ms": 1e3 * seconds, "tokens_per_second": rows * length / seconds,
        "mfu": flops / seconds / (peak * run.mesh.size) if peak else None,
        "peak_memory_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "compile_seconds": compile_seconds, "devices": run.mesh.size, "mesh": dict(run.mesh.shape),
    }


def random_batch(settings: Settings, mesh: jax.sharding.Mesh) -> Batch:
    """A batch with the shapes and types of a real one."""
    rng = np.random.default_rng(settings.seed)
    rows, length, vocabulary = settings.data.global_batch_size, settings.data.sequence_length, settings.model.vocab_size

    def tokens(*shape: int) -> np.ndarray:
        return rng.integers(0, vocabulary, shape, dtype=np.int32)

    batch = {"tokens": tokens(rows, length)}
    if settings.model.family == "gpt":
        batch |= {"targets": tokens(rows, length), "loss_mask": np.ones((rows, length), bool)}
    else:
        masking = settings.data.masking
        predictions = masking.max_predictions or int(np.ceil(masking.probability * length))
        positions = np.argsort(rng.random((rows, length)), axis=1)[:, :predictions].astype(np.int32)
        batch |= {"masked_positions": positions, "masked_targets": tokens(rows, predictions),
                  "masked_mask": np.ones((rows, predictions), bool)}
    if settings.model.next_sentence:
        batch |= {"token_types": rng.integers(0, 2, (rows, length), dtype=np.int32),
                  "next_sentence": rng.integers(0, 2, rows, dtype=np.int32), "next_sentence_mask": np.ones(rows, bool)}
    if settings.data.packing == "documents" or settings.model.next_sentence:
        batch |= {"segment_ids": np.ones((rows, length), np.int32),
                  "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))}
    return jax.device_put(batch, batch_sharding(mesh))
