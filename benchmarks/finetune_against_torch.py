"""The same fine-tuning by jaxlm and by Hugging Face transformers on PyTorch: accuracy and seconds, several seeds each.

    python benchmarks/finetune_against_torch.py --run RUN --train TRAIN.tsv --dev DEV.tsv --test TEST.tsv
        [--torch-python PYTHON] [--seeds 3] [--folder FOLDER] [KEY=VALUE ...]

RUN is a pretrained BERT of jaxlm; it is exported, so that both sides begin with the same weights and tokenizer. The
files are `text<TAB>label` without a header; both sides take configs/classify.yaml's recipe: the same AdamW, linear
schedule, batches, steps, dropout and length. The head's first weights and the order of the examples differ, as they do
between seeds. The sides take turns. Prints a markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "classify.yaml"


def jaxlm(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "jaxlm", *words], check=True, capture_output=True, text=True).stdout


def by_jaxlm(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Accuracy on the test file of the last step, and seconds from the command to its end, without preparing text."""
    run_dir = folder / f"jaxlm_{seed}"
    words = [f"init={arguments.run}", f"run_dir={run_dir}", f"data.raw={arguments.train}", f"data.validation={arguments.dev}",
             f"data.corpus={folder / 'corpus'}", f"seed={seed}", "logging.tensorboard=false", *arguments.overrides]
    jaxlm("prepare", str(RECIPE), *words)
    began = time.monotonic()
    jaxlm("train", str(RECIPE), *words)
    seconds = time.monotonic() - began
    row = json.loads(jaxlm("evaluate", str(run_dir), f"data.raw={arguments.test}", "--json"))
    return {"accuracy": row["val_accuracy"], "seconds": seconds}


def by_torch(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """The same from the loop below, in the other environment's Python."""
    from jaxlm import config  # which the other environment does not have

    settings = config.load(RECIPE, arguments.overrides)
    recipe = {"folder": str(folder / "pretrained"), "train": arguments.train, "test": arguments.test, "seed": seed,
              "steps": settings.train.steps, "warmup": settings.schedule.warmup_steps, "batch": settings.data.global_batch_size,
              "length": settings.data.sequence_length, "rate": settings.optimizer.learning_rate, "b1": settings.optimizer.b1,
              "b2": settings.optimizer.b2, "decay": settings.optimizer.weight_decay, "clip": settings.optimizer.clip_norm,
              "dropout": settings.model.dropout}
    done = subprocess.run([arguments.torch_python, __file__, "--in-torch", json.dumps(recipe)], check=True, capture_output=True,
                          text=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_torch(recipe: dict) -> None:
    """Runs where torch and transformers are; prints one line of JSON."""
    import torch
    import transformers

    began = time.monotonic()
    torch.manual_seed(recipe["seed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe["folder"])
    texts, labels = zip(*(line.rsplit("\t", 1) for line in Path(recipe["train"]).read_text("utf-8").splitlines()), strict=True)
    names = sorted(set(labels))
    dropout = {"hidden_dropout_prob": recipe["dropout"], "attention_probs_dropout_prob": recipe["dropout"]}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        recipe["folder"], num_labels=len(names), **dropout)

    def encode(texts):
        return tokenizer(list(texts), truncation=True, max_length=recipe["length"], padding="max_length", return_tensors="pt")

    inputs, targets = encode(texts), torch.tensor([names.index(label) for label in labels])
    plain = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": recipe["decay"]}, {"params": plain, "weight_decay": 0.0}],
                                  lr=recipe["rate"], betas=(recipe["b1"], recipe["b2"]))
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, recipe["warmup"], recipe["steps"])
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(recipe["steps"]):
        if len(order) < recipe["batch"]:
            order = torch.cat([order, torch.randperm(len(targets))])
        rows, order = order[: recipe["batch"]], order[recipe["batch"]:]
        loss = model(**{name: array[rows] for name, array in inputs.items()}, labels=targets[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - began
    model.eval()
    texts, labels = zip(*(line.rsplit("\t", 1) for line in Path(recipe["test"]).read_text("utf-8").splitlines()), strict=True)
    inputs, right = encode(texts), 0
    with torch.no_grad():
        for first in range(0, len(labels), 128):
            said = model(**{name: array[first : first + 128] for name, array in inputs.items()}).logits.argmax(-1)
            right += sum(names[one] == label for one, label in zip(said.tolist(), labels[first : first + 128], strict=True))
    print(json.dumps({"accuracy": right / len(labels), "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-torch", type=json.loads, help=argparse.SUPPRESS)
    for name in ("run", "train", "dev", "test"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, for both sides")
    arguments = parser.parse_args()
    if arguments.in_torch:
        in_torch(arguments.in_torch)
        return
    folder = (arguments.folder or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pretrained").exists():
        jaxlm("export", arguments.run, f"out={folder / 'pretrained'}")
    found = {"jaxlm": [], "transformers on PyTorch": []}
    for seed in range(arguments.seeds):
        found["jaxlm"].append(by_jaxlm(arguments, folder, seed))
        found["transformers on PyTorch"].append(by_torch(arguments, folder, seed))
        print(f"seed {seed}: {found['jaxlm'][-1]}, {found['transformers on PyTorch'][-1]}", file=sys.stderr, flush=True)
    print("| | accuracy on the test file, mean of the seeds | each seed | seconds, median |")
    print("| --- | --- | --- | --- |")
    for name, rows in found.items():
        each = [100 * row["accuracy"] for row in rows]
        print(f"| {name} | {statistics.mean(each):.2f} % | {', '.join(f'{one:.2f}' for one in each)} | "
              f"{statistics.median(row['seconds'] for row in rows):.0f} |")


if __name__ == "__main__":
    main()
