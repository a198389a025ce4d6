"""Breaks a jaxlm process from outside: put this folder on PYTHONPATH and say what to break in JAXLM_TEST_FAULTS (JSON).

    {"record": FOLDER}              every row that goes to the devices is written down
    {"nan": "loss", "steps": [7]}   the loss, the "gradient", or one "row" of the batch of these steps is not a number
    {"spike": 50, "steps": [70]}    the loss of these steps is 50 times as large
    {"transient": true}             the batch of the diagnosis is good again
    {"slow": 0.2, "process": 1}     a process takes so many seconds longer for every batch
    {"corrupt": 2, "steps": [9]}    one bit of the parameters on device 2 is turned after these steps
    {"phases": FOLDER}              what each process began to do last stands in FOLDER/PID
    {"longest_pause": 1.0}          the supervisor waits no longer than so many seconds

In any case every process keeps what it has compiled: JAX lets only the first write its cache, and the key of a CPU
program differs between processes, so that the others would compile everything again at every start.
"""

import contextlib
import importlib.abc
import importlib.util
import json
import os
import sys
import time

FAULTS = json.loads(os.environ.get("JAXLM_TEST_FAULTS", "{}"))


class Patched(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module as it is, then changes it."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.change(module)


def keep_all_programs(compiler):
    plain_write = compiler._cache_write

    def write(*arguments):
        process, compiler.distributed.global_state.process_id = compiler.distributed.global_state.process_id, 0
        try:
            return plain_write(*arguments)
        finally:
            compiler.distributed.global_state.process_id = process

    compiler._cache_write = write


def tell_phases(watch):
    plain = watch.Watch.phase

    @contextlib.contextmanager
    def phase(self, name, seconds=None):
        with plain(self, name, seconds) as inner:
            with open(os.path.join(FAULTS["phases"], str(os.getpid())), "w") as file:
                file.write(name)
            yield inner

    watch.Watch.phase = phase


def hurry(supervisor):
    supervisor.LONGEST_PAUSE = FAULTS["longest_pause"]


def break_it(loop):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.models.model import Model

    plain_next, plain_shapes, plain_terms = loop.Loop._next, loop.abstract_batch, Model.terms
    steps = set(FAULTS.get("steps", ()))

    def factor(batch, value, only_one_row=False):
        rows = batch["tokens"]
        values = np.full(rows.shape[0], value, np.float32)
        values[1 if only_one_row else len(values):] = 1
        return jax.make_array_from_callback(values.shape, rows.sharding, lambda index: values[index[0]])

    def next_batch(self, source, step):
        if "slow" in FAULTS and jax.process_index() == FAULTS.get("process", 0):
            time.sleep(FAULTS["slow"])
        batch = plain_next(self, source, step)
        if "record" in FAULTS:
            record(step, batch)
        if "nan" in FAULTS:
            batch = batch | {"factor": factor(batch, np.nan if step in steps else 1.0, FAULTS["nan"] == "row")}
        if "spike" in FAULTS:
            batch = batch | {"factor": factor(batch, FAULTS["spike"] if step in steps else 1.0)}
        return batch

    def record(step, batch):
        tokens = batch["tokens"]
        with open(os.path.join(FAULTS["record"], f"{os.getpid()}.jsonl"), "a") as file:
            for shard in tokens.addressable_shards:
                first = shard.index[0].indices(tokens.shape[0])[0]
                for row, line in enumerate(np.asarray(shard.data)):
                    file.write(json.dumps([step, first + row, line.tobytes().hex()[:4096]]) + "\n")

    def shapes(settings, mesh):
        found = plain_shapes(settings, mesh)
        if "nan" in FAULTS or "spike" in FAULTS:
            rows = found["tokens"]
            found |= {"factor": jax.ShapeDtypeStruct(rows.shape[:1], np.float32, sharding=rows.sharding)}
        return found

    @jax.custom_vjp
    def only_backward(loss, value):
        return loss

    only_backward.defvjp(lambda loss, value: (loss, value), lambda value, slope: (slope * value, None))

    def broken(self, params, batch, keys=None):
        terms = plain_terms(self, params, {name: array for name, array in batch.items() if name != "factor"}, keys)
        if "factor" not in batch:
            return terms
        value = jnp.mean(batch["factor"])
        change = (lambda loss: only_backward(loss, value)) if FAULTS.get("nan") == "gradient" else (lambda loss: loss * value)
        return {name: term._replace(loss=change(term.loss)) for name, term in terms.items()}

    def diagnose(self, step_function, state, last):
        batch = last.batch | {"factor": factor(last.batch, 1.0)} if FAULTS.get("transient") else last.batch
        return plain_diagnose(self, step_function, state, last._replace(batch=batch))

    plain_diagnose, plain_pause = loop.Loop._diagnose, loop.Loop._pause

    def pause(self, step, state):
        if "corrupt" in FAULTS and step in steps:
            state = state._replace(params=jax.tree.map_with_path(turned, state.params))
        return plain_pause(self, step, state)

    def turned(path, leaf):
        if path[0].key != "token_embedding":
            return leaf
        pieces = []
        for shard in leaf.addressable_shards:
            data = np.array(shard.data)
            if shard.device.id == FAULTS["corrupt"]:
                data.view(np.uint32).reshape(-1)[5] ^= 1 << 20
            pieces.append(jax.device_put(data, shard.device))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, pieces)

    loop.Loop._next, loop.abstract_batch = next_batch, shapes
    loop.Loop._diagnose, loop.Loop._pause = diagnose, pause
    if "nan" in FAULTS or "spike" in FAULTS:
        Model.terms = broken


CHANGES = {"jax._src.compiler": keep_all_programs}
if "phases" in FAULTS:
    CHANGES["jaxlm.safety.watch"] = tell_phases
if "longest_pause" in FAULTS:
    CHANGES["jaxlm.safety.supervisor"] = hurry
if FAULTS.keys() - {"phases", "longest_pause"}:
    CHANGES["jaxlm.training.loop"] = break_it
sys.meta_path[:0] = [Patched(name, change) for name, change in CHANGES.items()]
