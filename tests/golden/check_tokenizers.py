"""Exports every kind of tokenizer, loads it with transformers' AutoTokenizer, and compares ids of 1,000 strings.

Needs the `torch` extra; run by hand: `python tests/golden/check_tokenizers.py`. Exits 1 where any differ. The everyday
tests compare with the `tokenizers` library alone.
"""

import inspect
import json
import sys
import tempfile
import textwrap
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from jaxlm.data.tokenizer_training import train_tokenizer
from jaxlm.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer, load_tokenizer
from jaxlm.interop.tokenizers import probe_texts, write_tokenizer

GOLDEN = Path(__file__).parent / "tokenizers"
STRINGS = 1000
TEXTS = ["The quick brown fox, naïve café in Köln: 日本 und Ελλάδα.\n" * 3, inspect.getsource(textwrap),
         inspect.getsource(inspect)]
MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "bert", "roberta", "distilbert", "modernbert")
CAUSAL = MODELS[:5]


def kinds() -> dict[str, Tokenizer]:
    trained = {f"{kind}{' lowercase' * lowercase}": train_tokenizer(kind, TEXTS, 500, lowercase)
               for kind in ("bpe", "unigram", "wordpiece") for lowercase in (False, True)}
    given = {f"given {path.name}": load_tokenizer(path) for path in sorted(GOLDEN.iterdir()) if path.is_dir()}
    return {**trained, "bytes": ByteTokenizer({}), "characters": CharacterTokenizer.of("".join(TEXTS), end_mark=True), **given}


def differences(tokenizer: Tokenizer, model_type: str) -> tuple[int, str]:
    """How many strings have other ids; and rows with special tokens are compared, too."""
    causal = model_type in CAUSAL
    start = tokenizer.special.bos if causal else None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}))
        check = write_tokenizer(tokenizer, folder, model_type=model_type, max_length=128, causal=causal, start=start)
        loaded = (PreTrainedTokenizerFast if check.notes else AutoTokenizer).from_pretrained(folder)
        texts = [*islice(probe_texts(tokenizer), STRINGS)]
        count = sum(loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] != tokenizer.encode(text)
                    for text in texts)
        one, two = texts[-1], texts[-2]
        if not tokenizer.beside and not (causal and len(tokenizer.special.ids) == 0):
            special, framing = tokenizer.special, tokenizer.framing
            a, b = tokenizer.encode(one), tokenizer.encode(two)
            row = [*([start] if start is not None else []), *a] if causal else [*framing.start, *a, *framing.end]
            count += loaded(one, split_special_tokens=True)["input_ids"] != row
            if not causal and special.cls is not None:
                pair = loaded(one, two, split_special_tokens=True, return_token_type_ids=True)
                count += pair["input_ids"] != [*framing.start, *a, *framing.middle, *b, *framing.end]
                count += pair["token_type_ids"] != [0] * (len(a) + 2) + [1] * (len(b) + 1)
        return count, type(loaded).__name__


def main() -> None:
    logging.set_verbosity_error()
    total = 0
    for name, tokenizer in kinds().items():
        config = GOLDEN / name.removeprefix("given ") / "config.json"
        for model_type in [json.loads(config.read_text())["model_type"]] if config.exists() else MODELS:
            count, loaded = differences(tokenizer, model_type)
            total += count
            print(f"{name:24} {model_type:12} {loaded:24} {count} of {STRINGS} differ")
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
