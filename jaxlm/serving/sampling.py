"""Text from a causal model: prompts in, continuations out, one token at a time over a KV cache."""

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.data.sequences import start_token
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import UserError
from jaxlm.models.layers import Context
from jaxlm.models.model import Model, Params
from jaxlm.models.objectives import NextToken
from jaxlm.parallel.mesh import make_mesh
from jaxlm.runtime.processes import is_main
from jaxlm.settings import GenerateSettings, MeshSettings, Settings
from jaxlm.tasks.find import find_task
from jaxlm.training.corpora import encode_prompts
from jaxlm.training.setup import lay_mesh
from jaxlm.training.stages import of_checkpoint
from jaxlm.training.step import Trainer
from jaxlm.training.trained import opened


class Sample(NamedTuple):
    """One continuation: `text` goes on where `prompt` ends, blanks included."""

    prompt: str
    text: str

    def marked(self) -> str:
        """Both, for people, with a mark where the prompt ends; an empty one needs none."""
        return f"{self.prompt}{PROMPT_END}{self.text}" if self.prompt else self.text


PROMPT_END = "[prompt ends]"


def generate_from_run(settings: Settings) -> list[Sample]:
    """Continues `generate.prompts` with a checkpoint of `run_dir`. Raises UserError."""
    task = find_task(settings)
    if not task.continues_text:
        raise UserError(f"{task}: only models of task.name=causal_lm continue text")
    settings, mesh = lay_mesh(of_checkpoint(settings))
    with opened(settings, mesh_for_decoding(mesh)) as trained:
        continue_prompts = make_generator(trained.trainer, trained.tokenizer)  # refuses prompts that do not fit
        return continue_prompts(trained.params())


def mesh_for_decoding(mesh: Mesh) -> Mesh:
    """Sequences grow token by token through all layers: devices that cut sequences or layers take prompts of their
    own."""
    shape = mesh.shape
    settings = MeshSettings(data=shape["stage"] * shape["data"] * shape["expert"] * shape["context"], fsdp=shape["fsdp"],
                            tensor=shape["tensor"])
    return make_mesh(settings, mesh.devices.flatten())


def generate(trainer: Trainer, params: Params, tokenizer: Tokenizer) -> list[Sample]:
    """`make_generator`, for parameters that are used once."""
    return make_generator(trainer, tokenizer)(params)


def make_generator(trainer: Trainer, tokenizer: Tokenizer) -> Callable[[Params], list[Sample]]:
    """`num_samples` continuations of each prompt, in the prompts' order. Deterministic in the run's seed; compiled
    once.

    Raises:
      UserError: a prompt leaves no room in the model's length, or holds text the tokenizer cannot encode.
    """
    settings, limit = trainer.settings.generate, trainer.settings.model.max_length
    prompts = [prompt for prompt in settings.prompts for _ in range(settings.num_samples)]
    encoded = [ids for ids in encode_prompts(trainer.settings, tokenizer) for _ in range(settings.num_samples)]
    lengths = [len(ids) for ids in encoded]
    ways = trainer.mesh.shape["data"] * trainer.mesh.shape["fsdp"]
    rows = -(-len(prompts) // ways) * ways  # every device gets as many rows
    if max(lengths) + settings.max_new_tokens > limit and is_main():
        print(f"generate.max_new_tokens={settings.max_new_tokens}: a continuation ends where it and its prompt fill "
              f"model.max_length={limit} tokens", file=sys.stderr)
    if "" in prompts and start_token(tokenizer.special, trainer.settings.data.packing) is None and is_main():
        print("generate.prompts: '' begins with token 0, for the tokenizer has neither a start nor an end token", file=sys.stderr)
    tokens = np.zeros((rows, min(limit, max(lengths) + settings.max_new_tokens)), np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    lengths_array = np.array(lengths + [max(lengths)] * (rows - len(prompts)), np.int32)
    end_token = -1 if tokenizer.special.eos is None else tokenizer.special.eos
    model = trainer.model
    decode = jax.jit(model.traced(functools.partial(decode_batch, model, settings, min(lengths), end_token)),
                     out_shardings=NamedSharding(trainer.mesh, PartitionSpec()))  # every process reads the whole answer

    def continue_prompts(params: Params) -> list[Sample]:
        result = np.asarray(decode(params, tokens, lengths_array, jax.random.key(trainer.settings.seed)))
        samples = []
        for prompt, ids, row in zip(prompts, encoded, result, strict=False):
            new = row[len(ids) : len(ids) + settings.max_new_tokens].tolist()
            new = new[: new.index(end_token)] if end_token in new else new
            samples.append(Sample(prompt, tokenizer.decode_after(ids, new, prompt)))
        return samples

    return continue_prompts


def decode_batch(model: Model, settings: GenerateSettings, prefill: int, end_token: int, params: Params, tokens: jax.Array,
                 lengths: jax.Array, key: jax.Array) -> jax.Array:
    """Fills `tokens` int32 [B, S] from each row's length on.

    The first `prefill` positions, prompt in every row, run at once; from there one position at a time, where rows whose
    prompt is longer take their own next token. Stops early when every row has produced `end_token`.
    """
    rows, slots = tokens.shape
    network, head = model.bind(params), NextToken()
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))

    def next_logits(tokens: jax.Array, index: jax.Array | int, cache: dict) -> tuple[jax.Array, dict]:
        positions = jnp.broadcast_to(index + jnp.arange(tokens.shape[1]), tokens.shape)
        x, cache = network.hidden_with_cache(tokens, Context(positions, cache_index=jnp.asarray(index)), cache)
        return head.logits(network, x[:, -1:])[:, 0], cache

    def one_position(carry: tuple) -> tuple:
        index, tokens, logits, cache, ended = carry
        drawn = jax.vmap(functools.partial(draw, settings))(jax.vmap(lambda key: jax.random.fold_in(key, index))(keys), logits)
        token = jnp.where(index < lengths, tokens[:, index], jnp.where(ended, end_token, drawn))
        ended = ended | ((index >= lengths) & (token == end_token))
        logits, cache = next_logits(token[:, None], index, cache)
        return index + 1, tokens.at[:, index].set(token), logits, cache, ended

    logits, cache = next_logits(tokens[:, :prefill], 0, network.empty_cache(rows, slots))
    carry = (jnp.asarray(prefill), tokens, logits, cache, jnp.zeros(rows, bool))
    return jax.lax.while_loop(lambda carry: (carry[0] < slots) & ~carry[-1].all(), one_position, carry)[1]


def draw(settings: GenerateSettings, key: jax.Array, logits: jax.Array) -> jax.Array:
    """One token from float32 logits [V]: greedy at temperature 0, else among the top k and the nucleus (Holtzman et
    al. 2020)."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    logits = logits / settings.temperature
    if settings.top_k and settings.top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, settings.top_k)[0][-1], -jnp.inf, logits)
    if settings.top_p < 1:
        descending = jnp.sort(logits, descending=True)
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities) - probabilities  # mass of the likelier tokens
        smallest = jnp.where(before < settings.top_p, descending, jnp.inf).min()
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
