"""The same run on every layout: how far the loss and the gradient norm of 20 steps are from one device's.

    python benchmarks/parity.py [--text FILE] [gpt bert]

Trains benchmarks/parity.yaml in float32 through `jaxlm train`, on emulated CPU devices: one, eight along each axis of the mesh,
eight along all three, one with accumulated gradients, and two processes with four devices each. Prints a markdown table. FILE is
the text to train on; by default the language reference that every Python installation has.
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
    "one device": [],
    "data 8": ["devices.count=8"],
    "fsdp 8": ["devices.count=8", "mesh.fsdp=8"],
    "tensor 8": ["devices.count=8", "mesh.tensor=8"],
    "data 2, fsdp 2, tensor 2": ["devices.count=8", "mesh.fsdp=2", "mesh.tensor=2"],
    "accumulation 4": ["train.gradient_accumulation=4"],
    "2 processes x 4 devices, data 8": ["devices.count=4", "--processes=2"],
    "2 processes x 4 devices, fsdp 8": ["devices.count=4", "mesh.fsdp=8", "--processes=2"],
    "2 processes x 4 devices, tensor 8": ["devices.count=4", "mesh.tensor=8", "--processes=2"],
}
FAMILIES = ("gpt", "bert")
COLUMNS = ("loss", "grad_norm")


def rows_of(family: str, layout: list[str], run_dir: Path, text: Path, corpus: Path) -> list[dict]:
    """The metrics of every step."""
    command = [sys.executable, "-m", "jaxlm", "train", str(CONFIG), f"run_dir={run_dir}", f"model.family={family}",
               f"data.raw={text}", f"data.corpus={corpus}", *layout]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return [row for row in read_metrics(run_dir) if "loss" in row]


def largest_deviation(rows: list[dict], reference: list[dict], column: str) -> float:
    return max(abs(row[column] / other[column] - 1) for row, other in zip(rows, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="gpt, bert; both by default")
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    print("| model | layout | steps | loss, largest relative deviation | gradient norm, largest relative deviation |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families or FAMILIES:
            reference = None
            for number, (name, layout) in enumerate(LAYOUTS.items()):
                rows = rows_of(family, layout, Path(folder) / f"{family}{number}", arguments.text, Path(folder) / "corpus")
                reference = reference or rows
                loss, norm = (largest_deviation(rows, reference, column) for column in COLUMNS)
                print(f"| {family} | {name} | {len(rows)} | {loss:.1e} | {norm:.1e} |", flush=True)


if __name__ == "__main__":
    main()
