"""What is said of a model's size."""

import functools
from dataclasses import replace
from pathlib import Path

from jaxlm import config
from jaxlm.models.parameters import num_parameters
from jaxlm.models.sizes import loss_chunk
from jaxlm.settings import ModelSettings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SETTINGS = {path.stem: replace(model, vocab_size=model.vocab_size or 1000)
            for path in CONFIGS for model in [config.load(path).model]}


def test_published_numbers_of_parameters():
    """GPT-2 small and XL (124,439,808 and 1,557,611,200 in the released weights), Llama 3 8B (8,030,261,248)."""
    gpt2 = ModelSettings(vocab_size=50257)
    assert num_parameters(gpt2) == 124_439_808
    assert num_parameters(replace(gpt2, num_layers=48, num_heads=25, hidden_size=1600)) == 1_557_611_200
    assert num_parameters(SETTINGS["llama_8b"]) == 8_030_261_248
    bert = replace(SETTINGS["bert_base"], next_sentence=False)  # 109,482,240 in the released weights, 590,592 of the pooler
    assert num_parameters(bert) == 109_482_240 - 590_592 + (768 * 768 + 768) + 2 * 768 + 30522


def test_a_chunk_of_the_loss_is_what_is_allowed_or_at_least_half_of_it():
    for length in range(1, 80):
        for most in range(1, 90):
            size = loss_chunk(length, rows=8, vocab_size=1000, width=64, most=most)
            assert min(most, length) <= 2 * size and size <= min(most, length)
    assert loss_chunk(97, rows=8, vocab_size=1000, width=64, most=10) == 10  # nine chunks and seven positions: 97 is prime


def test_a_chunk_of_the_loss_is_as_large_as_memory_allows():
    """2 sequences of 4,096 positions and 1,000 rows of a table 64 wide: float32 logits of a position of both take
    8,000 bytes."""
    chunk = functools.partial(loss_chunk, 4096, rows=2, vocab_size=1000, width=64)
    assert chunk(memory=0.0) == 4096  # 64 MiB hold 8,388 positions of both
    assert loss_chunk(4096, rows=2, vocab_size=100_000, width=64, memory=0.0) == 64  # 83 fit into 64 MiB; 64 divides 4,096
    assert loss_chunk(4096, rows=2, vocab_size=100_000, width=64, memory=1e9) == 1024  # 1,250 fit into 1 GB
    assert loss_chunk(4096, rows=2, vocab_size=100_000, width=64, memory=1e12) == 4096  # all of them
    assert loss_chunk(4096, rows=16, vocab_size=100_000, width=64, memory=1e12) == 1024  # 16,384 positions are enough
    assert loss_chunk(4096, rows=2, vocab_size=100_000, width=64, most=16, memory=1e12) == 16  # what the user says goes first
