#!/usr/bin/env bash
# A model's whole life on a laptop's CPU, in under six minutes and without a download: text, tokenizer, a BERT and a GPT
# pretrained, the BERT fine-tuned to tell packages of Python's library apart, evaluated, exported, loaded again.
#
#   examples/life.sh [FOLDER]        (default: life)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-life}
mkdir -p "$folder" && cd "$folder"
small='model.num_layers=2 model.num_heads=4 model.hidden_size=128 model.max_length=64 data.sequence_length=64
  logging.tensorboard=false devices.platform=cpu'
say() { printf '\n== %s\n' "$*"; }

say "text: Python's own library, and lines of it with the package that they are of"
python "$here/records.py" .

say "a tokenizer, and a BERT that fills in hidden tokens"
# shellcheck disable=SC2086
jaxlm train "$here/../configs/quickstart_bert.yaml" run_dir=bert $small train.steps=300 eval.every_steps=300

say "the same BERT, which now learns to classify"
# shellcheck disable=SC2086
jaxlm train "$here/../configs/classify.yaml" init=bert run_dir=classifier data.raw=train.tsv data.validation=dev.tsv $small \
  train.steps=200 eval.every_steps=100 optimizer.learning_rate=3e-4
jaxlm evaluate classifier data.raw=test.tsv
jaxlm predict classifier data.raw=test.tsv
jaxlm report classifier > /dev/null

say "a GPT"
# shellcheck disable=SC2086
jaxlm train "$here/../configs/quickstart.yaml" run_dir=gpt $small train.steps=200 eval.every_steps=200
jaxlm generate gpt --prompt 'def main' generate.temperature=0 generate.max_new_tokens=16

say "out, and in again"
for run in classifier gpt; do
  jaxlm export "$run" out="$run-huggingface"
  jaxlm import "$run-huggingface" run_dir="$run-again"
done
python - <<'PYTHON'
import json

import numpy as np

import jaxlm

before, after = jaxlm.load("gpt"), jaxlm.load("gpt-again")
np.testing.assert_allclose(after.logits("import os"), before.logits("import os"), rtol=1e-4, atol=1e-4)
keys = {"temperature": 0.0, "max_new_tokens": 16}
assert after.generate("def main", **keys) == before.generate("def main", **keys)
before, after = jaxlm.load("classifier"), jaxlm.load("classifier-huggingface")
lines = [json.loads(line) for line in open("classifier/predictions.jsonl", encoding="utf-8")]
texts = [line["text"] for line in lines[:64]]
assert [one["label"] for one in after.predict(texts)] == [one["label"] for one in before.predict(texts)]
print(f"the same logits, texts and labels; for example: {texts[0]!r} is {after.predict(texts[0])['label']}")
PYTHON
say "done: $(pwd)"
