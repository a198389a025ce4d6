"""RUN_DIR/checkpoints: asynchronous, sharded, atomic (Orbax); what is kept, and what a checkpoint says of itself."""

import dataclasses
import importlib.metadata
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxlm.errors import UserError
from jaxlm.models.model import Params
from jaxlm.parallel.pipeline import layer_order
from jaxlm.parallel.sharding import abstract
from jaxlm.settings import CheckpointSettings, ModelSettings, flatten
from jaxlm.training.step import Trainer, TrainState, reorder_layers

FOLDER = "checkpoints"

# What may not change while a run goes on, and why. All else may: learning rate, dropout, mesh, precision, kernels, ...
FREE_IN_MODEL = ("dropout", "attention_dropout", "z_loss", "initializer_range", "attention")
MODEL_KEYS = {f"model.{field.name}": "the parameters were trained in that architecture"
              for field in dataclasses.fields(ModelSettings) if field.name not in FREE_IN_MODEL}
FIXED_KEYS = MODEL_KEYS | {
    "optimizer.name": "the optimizer's state is of that update rule",
    "optimizer.b1": "the optimizer's state holds a mean that decays by it",
} | dict.fromkeys(("seed", "data.global_batch_size", "data.sequence_length", "data.packing", "data.masking.probability",
                   "data.masking.whole_word", "data.masking.max_predictions"), "the examples of every step depend on it")


class Checkpoints:
    """The checkpoints of one run. Each holds `params`, `optimizer`, `clock` (step and random key) and `metadata`.

    `metadata` is plain JSON: the step, the seconds so far, the run's settings, the tokenizer itself, the corpus digests, the
    mesh, and the versions that wrote it. Use as a context manager: leaving waits for the last save.
    """

    def __init__(self, run_dir: str | Path, keep: CheckpointSettings | None = None):
        """With `keep` None the folder is only read. Raises UserError when it does not exist then."""
        self.directory = (Path(run_dir) / FOLDER).absolute()  # Orbax writes in the background: relative paths fail there
        if keep is None and not self.directory.is_dir():
            raise UserError(f"{run_dir}: no {FOLDER} folder; expected the run directory of a `jaxlm train`")
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_preservation(keep) if keep else None, cleanup_tmp_directories=keep is not None)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; an interrupted save is not among them."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def choose(self, step: int | None) -> int:
        """`step`, or the newest. Raises UserError when it is not there."""
        if not self.steps:
            raise UserError(f"{self.directory}: no complete checkpoint yet; train longer, or lower checkpoint.every_steps")
        if step is not None and step not in self.steps:
            raise UserError(f"checkpoint.step={step}: not in {self.directory}; there are {', '.join(map(str, self.steps))}")
        return self.steps[-1] if step is None else step

    def save(self, state: TrainState, step: int, metadata: dict[str, Any], val_loss: float | None) -> None:
        """Copies the state off the devices and returns; the files are written in the background."""
        contents = {"params": state.params, "optimizer": state.optimizer, "clock": {"step": state.step, "key": state.key},
                    "metadata": metadata | {"step": step}}
        # NaN would pass for the best, since nothing compares below it
        metrics = {"val_loss": val_loss} if val_loss is not None and math.isfinite(val_loss) else None
        self._checkpointer.save_checkpointables_async(step, contents, metrics=metrics)

    def metadata(self, step: int) -> dict[str, Any]:
        """What the checkpoint says of itself."""
        return self._load(step, {"metadata": None})["metadata"]

    def restore(self, step: int, trainer: Trainer) -> TrainState:
        """The whole state, laid out for `trainer`'s mesh, whatever mesh it was saved from."""
        wanted = abstract(trainer.state_shapes, trainer.state_shardings)
        loaded = self._load(step, {
            "params": wanted.params, "optimizer": wanted.optimizer, "clock": {"step": wanted.step, "key": wanted.key}})
        state = TrainState(loaded["clock"]["step"], loaded["clock"]["key"], loaded["params"], loaded["optimizer"])
        return self._in_order(step, state, trainer, trainer.state_axes, trainer.state_shardings)

    def restore_params(self, step: int, trainer: Trainer) -> Params:
        """Only the parameters, laid out for `trainer`'s mesh."""
        wanted = abstract(trainer.state_shapes.params, trainer.state_shardings.params)
        params = self._load(step, {"params": wanted})["params"]
        return self._in_order(step, params, trainer, trainer.state_axes.params, trainer.state_shardings.params)

    def _in_order(self, step: int, tree: Any, trainer: Trainer, axes: Any, layout: Any) -> Any:
        """Stacked arrays with their layers in the order that `trainer`'s pipeline wants them in."""
        metadata = self.metadata(step)
        saved = layer_order(metadata["settings"]["model"]["num_layers"], metadata["mesh"].get("stage", 1),
                            metadata["settings"]["train"].get("stage_repeats", 1))
        order = np.argsort(saved)[trainer.layer_order]
        if (order == np.arange(len(order))).all():
            return tree
        on_device = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), layout)  # nothing is computed on the host

        def reordered(tree: Any) -> Any:
            return reorder_layers(jax.device_put(tree, on_device), axes, order)

        return jax.jit(reordered, out_shardings=layout, donate_argnums=0)(tree)

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, wanted)
        except (KeyError, ValueError, OSError) as error:
            raise UserError(f"{self.directory / str(step)}: damaged, or not a checkpoint of this model ({_first_line(error)}); "
                            "delete it to go on from the one before") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def versions() -> dict[str, str]:
    """Versions of the packages whose numbers end up in a checkpoint."""
    packages = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {name: importlib.metadata.version(name) for name in packages}


def refuse_changes(keys: dict[str, str], saved: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Refuses settings (nested plain values) that differ from those saved in one of `keys` (name: reason). Raises UserError."""
    before, now = flatten(saved), flatten(wanted)
    for key, reason in keys.items():
        if key in before and before[key] != now[key]:  # else the key is younger than the checkpoint
            raise UserError(f"{key}={now[key]}: the checkpoints in {where} were made with {before[key]}, and {reason}; "
                            "set it back, or choose another run_dir")


def _preservation(keep: CheckpointSettings) -> Any:
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep.keep_last)]
    if keep.keep_every_steps:
        kept.append(policies.EveryNSteps(keep.keep_every_steps))
    if keep.keep_best:
        # reverse: the lowest; without metrics a checkpoint must not count as best, or all would stay
        kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=keep.keep_best,
                                   keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(kept)
