"""Exports every golden folder that jaxlm reads, and compares what transformers computes with them with what it
computed before.

    python tests/golden/check_exports.py make FOLDER            # where jaxlm is installed: imports and exports
    python tests/golden/check_exports.py check FOLDER           # where torch and transformers are: loads and compares
    python tests/golden/check_exports.py resave FOLDER SAVED    # there, too: as this version of transformers saves them
    python tests/golden/check_exports.py make AGAIN SAVED       # and these go in and out

Exits 1 where a class says of the export that a weight is missing or unexpected, or where a logit differs by more than
1e-4 of the largest.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "huggingface"
TOLERANCE = 1e-4
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3, "<unk>": 4}  # the golden models have 61 tokens, and pad with 1


def with_tokenizer(folder: Path, copy: Path) -> Path:
    """A copy of a golden folder with a tokenizer of as many words as the model has tokens."""
    shutil.copytree(folder, copy)
    words = SPECIAL | {f"w{number}": number for number in range(len(SPECIAL), 61)}
    added = [{"id": number, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for name, number in SPECIAL.items()]
    first, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    marks = (("<s>", 0), ("</s>", 0), ("</s>", 1))
    start, end, last = ({"SpecialToken": {"id": name, "type_id": number}} for name, number in marks)
    template = {"type": "TemplateProcessing", "single": [start, first, end], "pair": [start, first, end, second, last],
                "special_tokens": {name: {"id": name, "ids": [SPECIAL[name]], "tokens": [name]} for name in ("<s>", "</s>")}}
    (copy / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": template, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}}))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast"} | {f"{role}_token": name for role, name in names.items()}))
    return copy


def make(folder: Path, saved: Path | None = None) -> int:
    from jaxlm.cli import main

    failed = []
    for golden in sorted(GOLDEN.iterdir()):
        copy = saved / golden.name if saved else with_tokenizer(golden, folder / "with_tokenizer" / golden.name)
        run, out = folder / "runs" / golden.name, folder / golden.name
        code = main(["import", str(copy), f"run_dir={run}", "devices.platform=cpu"])
        code = code or main(["export", str(run), f"out={out}"])
        failed += [golden.name] if code else []
    print(f"not exported: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def check(folder: Path) -> int:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    problems = []
    for golden in sorted(GOLDEN.iterdir()):
        if (folder / golden.name).exists():
            problems += [f"{golden.name}: {problem}" for problem in compare(folder / golden.name, golden)]
    print("\n".join(problems or ["all the same"]))
    return bool(problems)


def resave(folder: Path, saved: Path) -> int:
    import transformers

    for golden in sorted(GOLDEN.iterdir()):
        [name] = json.loads((folder / golden.name / "config.json").read_text())["architectures"]
        getattr(transformers, name).from_pretrained(folder / golden.name).save_pretrained(saved / golden.name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / golden.name / file, saved / golden.name)
    return 0


def compare(export: Path, golden: Path) -> list[str]:
    """What is wrong with an export, a line each."""
    import torch
    import transformers

    [name] = json.loads((export / "config.json").read_text())["architectures"]
    auto = {"ForMaskedLM": "AutoModelForMaskedLM", "ForPreTraining": "AutoModelForPreTraining",
            "ForSequenceClassification": "AutoModelForSequenceClassification"}
    auto = next((found for ending, found in auto.items() if name.endswith(ending)), "AutoModelForCausalLM")
    model, told = getattr(transformers, auto).from_pretrained(export, output_loading_info=True)
    problems = [f"{kind}: {names}" for kind, names in told.items() if names]
    if type(model).__name__ != name:
        problems.append(f"{auto} makes {type(model).__name__} of it, config.json says {name}")
    with np.load(golden / "expected.npz", allow_pickle=False) as file:
        arrays = dict(file)
    inputs = {key.removeprefix("inputs/"): torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)
              for key, array in arrays.items() if key.startswith("inputs/")}
    with torch.no_grad():
        result = model.eval()(**inputs)
    for key, array in arrays.items():
        if key.startswith("outputs/") and "logits" in key:
            got = result[key.removeprefix("outputs/")].numpy()
            if got.ndim == 3:  # what a model says of padding is not kept: RoBERTa's padding has a position of its own
                got, array = (each[arrays["inputs/attention_mask"] > 0] for each in (got, array))
            difference = np.abs(got - array).max() / np.abs(array).max()
            if not difference <= TOLERANCE:
                problems.append(f"{key} differs by {difference:.3g} of the largest")
    transformers.AutoModel.from_pretrained(export)
    return problems


if __name__ == "__main__":
    sys.exit({"make": make, "check": check, "resave": resave}[sys.argv[1]](*map(Path, sys.argv[2:])))
