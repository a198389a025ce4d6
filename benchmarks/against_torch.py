"""Step time of jaxlm beside Hugging Face transformers on PyTorch, on this CPU, in one run.

    pip install -e . && pip install 'torch==2.13.0' transformers     # the second may be another environment:
    --torch-python python benchmarks/against_torch.py --torch-script torch_reference.py [--torch-python PYTHON]
    [--rounds 3] [SHAPE ...]

`torch_reference.py` is any program that prints one JSON line per precision with `precision` and `median_step_ms`,
for the arguments `gpt2|bert --layers --heads --hidden --length --batch --vocab
--steps`. The two are timed alternately, `--rounds` times; each side counts with its best precision, and with the
lowest of its medians, so that another program's load on the machine hits both alike. Prints a markdown table.
"""

import argparse
import json
import subprocess
import sys

SHAPES = {
    "gpt_tiny": dict(family="gpt", layers=4, heads=4, hidden=128, length=64, batch=12, vocab=65, steps=30),
    "gpt2_124m": dict(family="gpt", layers=12, heads=12, hidden=768, length=256, batch=4, vocab=50304, steps=5),
    "bert_tiny": dict(family="bert", layers=4, heads=4, hidden=256, length=128, batch=32, vocab=8192, steps=10),
}


def time_torch(shape: dict, python: str, script: str) -> dict[str, float]:
    """Median step in ms by precision."""
    arguments = [f"--{name}={shape[name]}" for name in ("layers", "heads", "hidden", "length", "batch", "vocab", "steps")]
    family = {"gpt": "gpt2", "bert": "bert"}[shape["family"]]
    lines = subprocess.run([python, script, family, *arguments], check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return {row["precision"]: row["median_step_ms"] for row in rows}


def time_jaxlm(shape: dict, config: str) -> dict[str, float]:
    """Median step in ms by precision, from `jaxlm bench`."""
    keys = {"model.family": "family", "model.num_layers": "layers", "model.num_heads": "heads", "model.hidden_size": "hidden",
            "model.vocab_size": "vocab", "model.max_length": "length", "data.sequence_length": "length",
            "data.global_batch_size": "batch", "bench.steps": "steps"}
    overrides = [f"{key}={shape[name]}" for key, name in keys.items()]
    medians = {}
    for precision in ("float32", "bfloat16"):
        command = [sys.executable, "-m", "jaxlm", "bench", config, *overrides, f"train.precision={precision}", "--json"]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        medians[precision] = json.loads(result.stdout)["median_step_ms"]
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--torch-script", required=True)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--config", default="benchmarks/bench.yaml", help="what both sides leave at the same value")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("| shape | jaxlm float32 | jaxlm bfloat16 | PyTorch float32 | PyTorch bfloat16 | PyTorch best / jaxlm best |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in arguments.shapes or SHAPES:
        ours, theirs = [], []
        for _ in range(arguments.rounds):
            ours.append(time_jaxlm(SHAPES[name], arguments.config))
            theirs.append(time_torch(SHAPES[name], arguments.torch_python, arguments.torch_script))
        best = [{precision: min(side[precision] for side in sides) for precision in ("float32", "bfloat16")}
                for sides in (ours, theirs)]
        cells = [f"{milliseconds:.1f} ms" for side in best for milliseconds in side.values()]
        print(f"| {name} | {' | '.join(cells)} | {min(best[1].values()) / min(best[0].values()):.2f} |", flush=True)


if __name__ == "__main__":
    main()
