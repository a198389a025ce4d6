"""What a run shows of itself on its way (logging.samples_every_steps): prompts continued by a gpt, masks filled by a
bert."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.generation.sampling import make_generator
from jaxlm.models.model import Params
from jaxlm.settings import AXES
from jaxlm.training.setup import Corpora, Run, dropless, make_validation_batches, on_devices, start
from jaxlm.training.step import reorder_layers
from jaxlm.training.stepping import Sampler

SHOWN = 3  # rows of masked text
SEPARATOR = "-" * 40 + "\n"


def make_sampler(run: Run, corpora: Corpora) -> Sampler | None:
    """For the parameters of `run` as they lie on its mesh; None: there is no text to show. Compiles at its first
    use, and changes nothing of the run. Every process of the run has to call it."""
    return _continuing(run, corpora) if run.settings.model.family == "gpt" else _filling(run, corpora)


def _continuing(run: Run, corpora: Corpora) -> Sampler:
    own = start(dropless(run.settings), _for_decoding(run))
    order = np.argsort(run.trainer.layer_order)
    as_decoded = jax.jit(lambda params: reorder_layers(params, run.trainer.state_axes.params, order),
                         out_shardings=own.trainer.state_shardings.params)
    with jax.set_mesh(own.mesh):
        generate = make_generator(own, corpora[0][0].tokenizer)

    def sample(params: Params) -> str:
        relaid = params if own.mesh is run.mesh else as_decoded(params)
        with jax.set_mesh(own.mesh):
            return SEPARATOR.join(f"{sample.marked()}\n" for sample in generate(relaid))

    return sample


def _for_decoding(run: Run) -> Mesh:
    """Text grows token by token through all layers: axes that cut sequences, layers or experts take rows of their
    own. The weights are then cut as finely as they can be: there is little room for a copy beside the optimizer's
    state. The devices keep their order, so that one program can move the arrays."""
    shape = run.mesh.shape
    if shape["stage"] == shape["context"] == shape["expert"] == 1:
        return run.mesh
    ways = run.mesh.size // shape["tensor"]
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": math.gcd(ways, run.settings.model.hidden_size), "tensor": shape["tensor"]}
    sizes["data"] = ways // sizes["fsdp"]
    return Mesh(run.mesh.devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _filling(run: Run, corpora: Corpora) -> Sampler | None:
    ways = math.prod(run.mesh.shape[axis] for axis in ("data", "fsdp", "expert", "stage"))
    rows = math.ceil(SHOWN / ways) * ways
    settings = dataclasses.replace(run.settings, eval=dataclasses.replace(run.settings.eval, batch_size=rows))
    validation = make_validation_batches(settings, corpora)
    if validation is None:
        return None
    tokenizer, shown = corpora[0][0].tokenizer, validation.batch(0, np.arange(min(SHOWN, rows)))
    with on_devices(validation, 0, 1, run.mesh, prefetch=1) as source:
        batch = next(iter(source))
    model = run.trainer.model
    fill = jax.jit(model.traced(lambda params, batch: model.bind(params).fill_masks(batch)),
                   out_shardings=NamedSharding(run.mesh, PartitionSpec()))  # every process reads the whole answer

    def sample(params: Params) -> str:
        filled = np.asarray(fill(params, batch))
        texts = []
        for tokens, places, wanted, mask, found in zip(*(shown[name] for name in (
                "tokens", "masked_positions", "masked_targets", "masked_mask")), filled, strict=False):
            places, wanted, found = places[mask], wanted[mask], found[mask]
            whole, hidden = tokens.copy(), np.flatnonzero(tokens == tokenizer.special.mask)
            whole[places] = wanted
            texts.append(f"text:   {tokenizer.decode(whole.tolist())}\n"
                         f"masked: {_marked(tokenizer, tokens, dict.fromkeys(hidden.tolist(), 'MASK'))}\n"
                         f"filled: {_marked(tokenizer, tokens, _decoded(tokenizer, places, found))}\n"
                         f"{(wanted == found).sum()} of {len(wanted)} right\n")
        return SEPARATOR.join(texts)

    return sample


def _decoded(tokenizer: Tokenizer, places: np.ndarray, tokens: np.ndarray) -> dict[int, str]:
    return {place: tokenizer.decode([token]).strip() for place, token in zip(places.tolist(), tokens.tolist(), strict=True)}


def _marked(tokenizer: Tokenizer, tokens: np.ndarray, words: dict[int, str]) -> str:
    """The text with `[word]` in these places: decoded piece by piece, for a tokenizer leaves out its own marks."""
    parts, begin = [], 0
    for place, word in sorted(words.items()):
        parts += [tokenizer.decode(tokens[begin:place].tolist()).strip(), f"[{word}]"]
        begin = place + 1
    return " ".join(filter(None, [*parts, tokenizer.decode(tokens[begin:].tolist()).strip()]))
