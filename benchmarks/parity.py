"""The same run on every layout: how far the losses and gradients of 10 steps are from one device's.

    python benchmarks/parity.py [--text FILE] [gpt bert moe]

Trains benchmarks/parity.yaml in float32 through `jaxlm train`, on emulated CPU devices and on two processes with
four of them each, and prints a markdown table. FILE is the text to train on; by default the language reference that
every Python installation has, a line a document.
"""

import argparse
import pydoc_data
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from jaxlm import config
from jaxlm.checkpoints.checkpoints import Checkpoints
from jaxlm.models.model import Model
from jaxlm.parallel.mesh import make_mesh
from jaxlm.reporting.metrics import read_metrics
from jaxlm.settings import MeshSettings
from jaxlm.training.step import from_saved, make_trainer

CONFIG = Path(__file__).with_name("parity.yaml")
TEXT = Path(pydoc_data.__path__[0]) / "topics.py"
LAYOUTS = {
    "one device": "",
    "data 8": "mesh.data=8",
    "fsdp 8": "mesh.fsdp=8",
    "tensor 8": "mesh.tensor=8",
    "context 8": "mesh.context=8",
    "stage 4, data 2": "mesh.stage=4 mesh.data=2 train.gradient_accumulation=8",
    "data 2, fsdp 2, tensor 2": "mesh.data=2 mesh.fsdp=2 mesh.tensor=2",
    "fsdp 2, context 2, tensor 2": "mesh.fsdp=2 mesh.context=2 mesh.tensor=2",
    "fsdp 4, tensor 2, host memory":
        'mesh.fsdp=4 mesh.tensor=2 optimizer.offload=true train.remat={"residual":"host","query_key_value":"keep"}',
    "data 2, context 4, remat": "mesh.data=2 mesh.context=4 train.remat=full",
    "stage 2, fsdp 2, tensor 2": "mesh.stage=2 mesh.fsdp=2 mesh.tensor=2 train.gradient_accumulation=4",
    "stage 2 interleaved, context 2, data 2":
        "mesh.stage=2 mesh.context=2 mesh.data=2 train.stage_repeats=2 train.gradient_accumulation=4",
    "stage 2 interleaved, tensor 4, remat":
        "mesh.stage=2 mesh.tensor=4 train.stage_repeats=2 train.gradient_accumulation=8 train.remat=full",
    "accumulation 4, data 2, tensor 4": "mesh.data=2 mesh.tensor=4 train.gradient_accumulation=4",
    "2 processes x 4 devices, data 8": "mesh.data=8 --processes=2",
    "2 processes x 4 devices, fsdp 2, context 2, tensor 2": "mesh.fsdp=2 mesh.context=2 mesh.tensor=2 --processes=2",
    "2 processes x 4 devices, stage 2, fsdp 4": "mesh.stage=2 mesh.fsdp=4 train.gradient_accumulation=2 --processes=2",
}
LAYOUTS_OF_MOE = {
    "expert 8": "mesh.expert=8",
    "expert 4, tensor 2": "mesh.expert=4 mesh.tensor=2",
    "stage 2, expert 2, context 2": "mesh.stage=2 mesh.expert=2 mesh.context=2 train.gradient_accumulation=4",
    "2 processes x 4 devices, expert 4, fsdp 2": "mesh.expert=4 mesh.fsdp=2 --processes=2",
}
MODELS = {  # dropout and segment masks in all of them
    "gpt": "model.family=gpt data.packing=documents model.dropout=0.1",
    "bert": "model.family=bert data.packing=documents model.dropout=0.1",
    "moe": "model.family=gpt data.packing=documents model.num_experts=8 model.activation=swiglu",
}


class Run(NamedTuple):
    """What a run left behind."""

    losses: np.ndarray  # [steps]
    gradients: list[np.ndarray]  # running means, one for each parameter


def run(model: str, layout: str, run_dir: Path, text: Path, corpus: Path) -> Run:
    """Trains, and reads the run directory."""
    count = 1 if "mesh." not in layout else 4 if "--processes=2" in layout else 8
    command = [sys.executable, "-m", "jaxlm", "train", str(CONFIG), f"run_dir={run_dir}", f"devices.count={count}",
               f"data.raw={text}", f"data.corpus={corpus}", *MODELS[model].split(), *layout.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    losses = [row["loss"] for row in read_metrics(run_dir) if "loss" in row]
    settings = config.load(run_dir)
    trainer = make_trainer(Model(settings.model, settings.train), settings, make_mesh(MeshSettings(), jax.devices()[:1]))
    with Checkpoints(run_dir) as checkpoints:
        state = from_saved(checkpoints.restore(checkpoints.choose(None), trainer.saved))
    return Run(np.array(losses), jax.device_get(jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))))


def deviations(got: Run, want: Run) -> tuple[float, float]:
    """Of the losses and of the gradients."""
    whole = np.sqrt(sum(np.square(array).sum() for array in want.gradients))
    gradients = (np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-3 * whole)
                 for one, other in zip(got.gradients, want.gradients, strict=True))
    return np.abs(got.losses / want.losses - 1).max(), max(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; all by default")
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print("| model | layout | steps | losses | gradients |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models or MODELS:
            reference = None
            for number, (name, layout) in enumerate((LAYOUTS | (LAYOUTS_OF_MOE if model == "moe" else {})).items()):
                got = run(model, layout, Path(folder) / f"{model}{number}", arguments.text, Path(folder) / "corpus")
                reference = reference or got
                losses, gradients = deviations(got, reference)
                print(f"| {model} | {name} | {len(got.losses)} | {losses:.1e} | {gradients:.1e} |", flush=True)


if __name__ == "__main__":
    main()
