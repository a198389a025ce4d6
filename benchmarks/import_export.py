"""How much memory and time `jaxlm import` and `jaxlm export` take, beside a plain copy of the same bytes.

    python benchmarks/import_export.py [--gib 2] [--folder FOLDER]

A Llama of random float32 weights is written in shards, imported and exported on 1 device, on 8 emulated ones and in 2
processes of 4. Memory is the highest resident set of a process (VmHWM) less that of the same command for a model of
two layers of width 64; allowed are the bytes of the shards that it holds, its largest tensor, and a tenth. Speed is
that of the model's bytes, from the start of the command to its end less that of the small model.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
WAYS = {"1 device": ([], 1), "8 devices": (["devices.count=8", "mesh.fsdp=2", "mesh.tensor=4"], 1),
        "2 processes of 4": (["devices.count=4", "mesh.fsdp=4", "mesh.tensor=2", "--processes", "2"], 2)}
# Runs the command and leaves the highest resident set of a process, in bytes, in a file.
COMMAND = """
import atexit, os, re, resource, sys
def peak():
    [kib] = re.findall(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of --processes: the largest of them
    open(os.environ["PEAK"], "w").write(str(1024 * max(int(kib), children)))
atexit.register(peak)
from jaxlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        found |= {f"{start}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"{start}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found |= {f"{start}mlp.down_proj.weight": (width, inner)}
        found |= {f"{start}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def make_folder(folder: Path, width: int, layers: int, inner: int) -> tuple[int, int]:
    """A Llama with a tokenizer of bytes; its bytes, and those of its largest tensor."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": width,
              "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(8192)}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}))
    random, weight_map, shapes = np.random.default_rng(0), {}, shapes_of(config)
    sizes = [4 * int(np.prod(shape)) for shape in shapes.values()]
    for number, (name, shape) in enumerate(shapes.items()):  # a tensor in each file
        file = f"model-{number:05}.safetensors"
        weight_map[name] = file
        header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, sizes[number]]}}).encode()
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            random.standard_normal(shape, np.float32).tofile(out)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes), max(sizes)


def run(arguments: list[str], peak: Path) -> tuple[float, int]:
    """Seconds, and the peak of the process that held most."""
    environment = os.environ | {"PEAK": str(peak), "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.perf_counter() - start, int(peak.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; it must have room for 5 times as much")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        work = Path(name)
        width, inner = (2048, 5632) if arguments.gib >= 1 else (1024, 2816)
        layer = 4 * (4 * width * width + 3 * width * inner)
        layers = max(2, round(arguments.gib * 2**30 / layer))
        size, largest = make_folder(work / "big", width, layers, inner)
        make_folder(work / "small", 64, 2, 128)
        start = time.perf_counter()
        shutil.copytree(work / "big", work / "copy")
        os.sync()
        copied = size / (time.perf_counter() - start)
        shutil.rmtree(work / "copy")
        print(f"{size / 2**30:.2f} GiB, largest tensor {largest / 2**20:.0f} MiB; a plain copy: {copied / 2**20:.0f} MiB/s")
        for way, (words, processes) in WAYS.items():
            for verb in ("import", "export"):
                figures = {}
                for model in ("small", "big"):
                    run_dir, out = work / f"{model}-run", work / f"{model}-out"
                    target = [str(work / model), f"run_dir={run_dir}"] if verb == "import" else [str(run_dir), f"out={out}"]
                    figures[model] = run([verb, *target, "devices.platform=cpu", *words], work / "peak")
                seconds = figures["big"][0] - figures["small"][0]
                held = figures["big"][1] - figures["small"][1]
                allowed = 1.1 * size / processes + largest
                print(f"{verb} on {way}: {size / seconds / 2**20:.0f} MiB/s ({size / seconds / copied:.2f} of a copy), "
                      f"{held / 2**30:.2f} GiB in a process, allowed {allowed / 2**30:.2f}", flush=True)
            for model in ("small", "big"):
                shutil.rmtree(work / f"{model}-run")
                shutil.rmtree(work / f"{model}-out")


if __name__ == "__main__":
    main()
