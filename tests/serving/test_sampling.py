"""Drawing follows the definitions, and decoding over the KV cache gives what whole forward passes give, on any mesh."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.tokenizers import SpecialTokens, Tokenizer
from jaxlm.errors import UserError
from jaxlm.models.layers import Context
from jaxlm.models.objectives import NextToken
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.sharding import shardings
from jaxlm.serving.sampling import Sample, draw, generate
from jaxlm.settings import DataSettings, GenerateSettings, MeshSettings, ModelSettings, Settings
from jaxlm.training.corpora import encode_prompts
from jaxlm.training.step import Trainer, start

VOCAB, MAX_LENGTH = 50, 16
GPT2 = ModelSettings(num_layers=2, num_heads=4, hidden_size=16, vocab_size=VOCAB, max_length=MAX_LENGTH)
LLAMA = dataclasses.replace(GPT2, num_kv_heads=2, positions="rope", normalization="rmsnorm", activation="swiglu", bias=False,
                            tied_embeddings=False, qk_norm=True, logit_soft_cap=20.0)


class Numbers(Tokenizer):
    """Token 7 is written "7": what is generated can be read back, token by token."""

    kind, vocab_size = "numbers", VOCAB

    def __init__(self, eos: int | None = None):
        super().__init__({})
        self.special = SpecialTokens(eos=eos)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode_plain(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def token_starts_word(self, token: int) -> bool:
        return True


@pytest.fixture(scope="module")
def complete(random_params) -> Callable[..., list[Sample]]:
    """`complete(model, mesh=..., tokenizer=..., seed=..., **generate)`: samples of a model with random parameters."""
    def run_generate(model: ModelSettings = GPT2, mesh: MeshSettings = MeshSettings(), tokenizer: Tokenizer = Numbers(),  # noqa: B008
                     seed: int = 0, **keys) -> list[Sample]:
        devices = jax.devices()[: mesh.fsdp * mesh.tensor]
        trainer = start(Settings(model=model, mesh=mesh, seed=seed, generate=GenerateSettings(**keys)), make_mesh(mesh, devices))
        params = jax.device_put(random_params(trainer.model), shardings(trainer.mesh, trainer.model.axes))
        with jax.set_mesh(trainer.mesh):
            return generate(trainer, params, tokenizer)

    return run_generate


@pytest.fixture(scope="module")
def whole_passes(random_params) -> Callable[[ModelSettings, list[int]], np.ndarray]:
    """`whole_passes(model, tokens)`: the logits [V] of the next token, from a forward pass over all of them, without
    a cache."""
    def last_logits(trainer: Trainer, params: dict, tokens: jax.Array, last: jax.Array) -> jax.Array:
        gpt = trainer.model.bind(params)
        x, _ = gpt.hidden(tokens[None], Context(jnp.arange(MAX_LENGTH)[None]))
        return NextToken().logits(gpt, x)[0, last]

    def next_logits(model: ModelSettings, tokens: list[int]) -> np.ndarray:
        if model not in compiled:
            trainer = start(Settings(model=model), make_mesh(MeshSettings(), jax.devices()[:1]))
            params = random_params(trainer.model)
            compiled[model] = jax.jit(lambda tokens, last: last_logits(trainer, params, tokens, last))
        return np.asarray(compiled[model](np.array(tokens + [0] * (MAX_LENGTH - len(tokens))), len(tokens) - 1))

    compiled: dict = {}
    return next_logits


def greedy(next_logits: Callable, model: ModelSettings, prompt: str, steps: int) -> str:
    tokens = [int(word) for word in prompt.split()]
    for _ in range(steps):
        tokens.append(int(next_logits(model, tokens).argmax()))
    return " ".join(map(str, tokens[len(prompt.split()):]))


# -------------------------------------------------------------------------------------------------------------- drawing

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 2.0, -1.0, 1.5], np.float32)


def shares(**keys) -> np.ndarray:
    """How often each token is drawn, of 20,000 times."""
    settings = GenerateSettings(**keys)
    drawn = jax.vmap(lambda key: draw(settings, key, jnp.asarray(LOGITS)))(jax.random.split(jax.random.key(0), 20_000))
    return np.bincount(drawn, minlength=len(LOGITS)) / len(drawn)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def assert_drawn(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found[expected == 0] == 0).all()
    assert found == pytest.approx(expected, abs=5 * np.sqrt(0.25 / 20_000))  # 5 standard deviations of the widest share


def test_temperature_zero_is_greedy():
    assert shares(temperature=0.0, top_k=3, top_p=0.5)[LOGITS.argmax()] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    assert_drawn(shares(temperature=temperature), softmax(LOGITS / temperature))


@pytest.mark.parametrize("top_k", [1, 3, 8, 100])
def test_top_k_draws_among_the_likeliest(top_k):
    kept = np.isin(np.arange(len(LOGITS)), np.argsort(-LOGITS)[:top_k])
    assert_drawn(shares(temperature=1.0, top_k=top_k), softmax(np.where(kept, LOGITS, -np.inf)))


@pytest.mark.parametrize(("top_p", "temperature", "top_k"), [
    (1e-6, 1.0, None), (0.5, 1.0, None), (0.9, 1.0, None), (0.9, 2.0, None), (0.8, 1.0, 3), (1.0, 1.0, None)])
def test_top_p_draws_from_the_nucleus(top_p, temperature, top_k):
    """Holtzman et al. 2020: the smallest set of the likeliest tokens whose probability reaches top_p."""
    order = np.argsort(-LOGITS)
    tempered = np.full(len(LOGITS), -np.inf)
    tempered[order[:top_k]] = LOGITS[order[:top_k]] / temperature
    size = next(n for n in range(1, len(LOGITS) + 1) if softmax(tempered)[order[:n]].sum() >= top_p - 1e-6)
    assert_drawn(shares(temperature=temperature, top_p=top_p, top_k=top_k),
                 softmax(np.where(np.isin(np.arange(len(LOGITS)), order[:size]), tempered, -np.inf)))


# ------------------------------------------------------------------------------------------------------------- decoding

PROMPTS = ["7 3 11 42", "5", "9 9 1 30 2 8 4", ""]


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_greedy_decoding_is_repeated_whole_passes(complete, whole_passes, model):
    """Prompts of different lengths, together, each as if it were alone; an empty one begins with token 0, having no
    end mark.

    Issue 14, line 4: the text goes on behind the prompt, with the blank that stands between them.
    """
    samples = complete(model, prompts=PROMPTS, temperature=0.0, max_new_tokens=6)
    assert [sample.prompt for sample in samples] == PROMPTS
    for sample in samples:
        assert sample.text == f" {greedy(whole_passes, model, sample.prompt or '0', 6)}"


def test_a_mesh_changes_nothing(complete):
    """Also not the random draws; three rows over two devices leave one to fill up."""
    keys = {"prompts": PROMPTS[:3], "temperature": 1.0, "max_new_tokens": 5}
    one = complete(LLAMA, **keys)
    assert complete(LLAMA, MeshSettings(fsdp=2, tensor=2), **keys) == one


def test_the_first_end_mark_ends_the_text(complete, whole_passes):
    """Of each row by itself: the others go on."""
    free = greedy(whole_passes, GPT2, PROMPTS[0], 8).split()
    end = int(free[3])
    samples = complete(tokenizer=Numbers(eos=end), prompts=[PROMPTS[0], PROMPTS[2]], temperature=0.0, max_new_tokens=8)
    other = greedy(whole_passes, GPT2, PROMPTS[2], 8).split()
    assert samples[0].text.split() == free[: free.index(str(end))]
    assert samples[1].text.split() == (other[: other.index(str(end))] if str(end) in other else other)
    assert samples[0].text.split() != free


def test_samples_differ_and_depend_on_the_seed(complete):
    keys = {"prompts": PROMPTS[:2], "num_samples": 3, "temperature": 1.0, "max_new_tokens": 8}
    samples = complete(**keys)
    assert [sample.prompt for sample in samples] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({sample.text for sample in samples}) == 6
    assert complete(seed=1, **keys) != samples


def test_the_models_length_is_respected(complete, whole_passes):
    """A sequence ends at max_length, whatever else is asked for, and the shorter prompt still gets all that it may."""
    long = "1 2 3 4 5 6 7 8 9 10 11 12 13 14"
    samples = complete(prompts=[long, "5"], temperature=0.0, max_new_tokens=40)
    assert samples[0].text.split() == greedy(whole_passes, GPT2, long, 2).split()
    assert samples[1].text.split() == greedy(whole_passes, GPT2, "5", 15).split()
    with pytest.raises(UserError, match=r"prompts: '1 2 3 .*\.\.\.' is 16 tokens long; expected fewer than model\.max_length=16"):
        complete(prompts=[f"{long} 15 16"])


# ------------------------------------------------------------------------------------------------------ what is printed

def test_samples_mark_where_the_prompt_ends():
    """Issue 14, line 4."""
    assert Sample("the cat", " sat").marked() == "the cat[prompt ends] sat"
    assert Sample("", "The cat sat").marked() == "The cat sat"


@pytest.mark.parametrize(("packing", "start_token", "special", "prompt", "expected"), [
    # documents: all of them begin with the start token (bos, else eos), and so does what goes on with one
    ("documents", True, SpecialTokens(bos=8, eos=9), "", [8]),
    ("documents", True, SpecialTokens(bos=8, eos=9), "1 2", [8, 1, 2]),
    ("documents", True, SpecialTokens(eos=9), "", [9]),
    ("documents", True, SpecialTokens(eos=9), "1 2", [9, 1, 2]),
    ("documents", True, SpecialTokens(), "1 2", [1, 2]),
    # a run from before start tokens
    ("documents", False, SpecialTokens(bos=8, eos=9), "1 2", [1, 2]),
    # concatenate: a document follows the end of another; what a prompt follows is not known
    ("concatenate", True, SpecialTokens(bos=8, eos=9), "", [9]),
    ("concatenate", True, SpecialTokens(bos=8, eos=9), "1 2", [1, 2]),
    ("concatenate", True, SpecialTokens(bos=8), "", [8]),
    ("concatenate", True, SpecialTokens(), "", [0]),
])
def test_prompts_begin_as_training_text_does(packing, start_token, special, prompt, expected):
    """Issue 14, line 6."""
    tokenizer = Numbers()
    tokenizer.special = special
    settings = Settings(model=GPT2, data=DataSettings(packing=packing, start_token=start_token),
                        generate=GenerateSettings(prompts=[prompt]))
    assert encode_prompts(settings, tokenizer) == [expected]
