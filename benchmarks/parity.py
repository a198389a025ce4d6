"""The same run on every layout: how far the loss and the gradient norm of 20 steps are from one device's.

    python benchmarks/parity.py [--text FILE] [gpt bert moe]

Trains benchmarks/parity.yaml in float32 through `jaxlm train`, on emulated CPU devices and on two processes with four of them
each, and prints a markdown table. FILE is the text to train on; by default the language reference that every Python
installation has, a line a document.
"""

import argparse
import pydoc_data
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxlm.reporting.metrics import read_metrics

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
COLUMNS = ("loss", "grad_norm")


def rows_of(model: str, layout: str, run_dir: Path, text: Path, corpus: Path) -> list[dict]:
    """The metrics of every step."""
    count = 1 if "mesh." not in layout else 4 if "--processes=2" in layout else 8
    command = [sys.executable, "-m", "jaxlm", "train", str(CONFIG), f"run_dir={run_dir}", f"devices.count={count}",
               f"data.raw={text}", f"data.corpus={corpus}", *MODELS[model].split(), *layout.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return [row for row in read_metrics(run_dir) if "loss" in row]


def largest_deviation(rows: list[dict], reference: list[dict], column: str) -> float:
    return max(abs(row[column] / other[column] - 1) for row, other in zip(rows, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; all by default")
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    print("| model | layout | steps | loss, largest relative deviation | gradient norm, largest relative deviation |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models or MODELS:
            reference = None
            for number, (name, layout) in enumerate((LAYOUTS | (LAYOUTS_OF_MOE if model == "moe" else {})).items()):
                rows = rows_of(model, layout, Path(folder) / f"{model}{number}", arguments.text, Path(folder) / "corpus")
                reference = reference or rows
                loss, norm = (largest_deviation(rows, reference, column) for column in COLUMNS)
                print(f"| {model} | {name} | {len(rows)} | {loss:.1e} | {norm:.1e} |", flush=True)


if __name__ == "__main__":
    main()
