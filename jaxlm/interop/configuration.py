"""config.json of transformers 4 and 5, read as `ModelSettings` and written from them, by the tables in `families.py`.

What cannot be here is refused by the name of its field. What is written is read back before it counts: a family fits
a model when its config.json says the same model.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxlm.errors import UserError, clipped, nearest, shown
from jaxlm.interop.families import FAMILIES, Family
from jaxlm.interop.safetensors import read_json
from jaxlm.models.sizes import head_dim, intermediate_size, kv_heads, pooling
from jaxlm.presets import PRESETS, TRUNKS
from jaxlm.settings import ModelSettings
from jaxlm.storage.files import Location

CONFIG = "config.json"
# What must be so in every family; the first is what a missing field means.
FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,), "is_decoder": (False, None), "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None), "pruned_heads": ({}, None), "partial_rotary_factor": (1.0, None), "adapters": (None,),
}
PROBLEMS = {"single_label_classification": "single_label", "multi_label_classification": "multi_label",
            "regression": "regression"}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
          "original_max_position_embeddings": "original_max_length"}
SCALINGS = {"linear": {"factor": "factor"}, "llama3": LLAMA3}  # rope_type -> theirs: ours
# Nothing that a model computes depends on these.
WITHOUT_EFFECT = ("dropout", "attention_dropout", "initializer_range", "scaled_initialization", "z_loss", "balance_loss",
                  "router_z_loss", "capacity_factor", "experts_per_token", "attention", "family", "next_sentence")


class Foreign(NamedTuple):
    """What a config.json says."""

    family: Family
    model: ModelSettings
    heads: tuple[str, ...] | None  # None: it names no class; the weights say it
    problem: str | None = None  # of heads.classification: single_label, multi_label, regression; None: it does not say
    labels: tuple[str, ...] = ()  # names by number
    pad_token: int = 1
    notes: tuple[str, ...] = ()  # what is not taken over


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_configuration(folder: Location) -> Foreign:
    """Raises UserError, naming the field that is missing, wrong or not supported."""
    path = folder / CONFIG
    try:
        return parse(read_json(path))
    except _Refused as error:
        raise UserError(f"{path}: {error}") from None


class _Refused(Exception):
    """Why a config.json is not taken, without its path."""


def parse(content: dict[str, Any]) -> Foreign:
    """Raises _Refused."""
    if content.get("auto_map"):
        raise _Refused(f"auto_map={shown(content['auto_map'])}: a model with code of its own, and no code from files is run")
    family = _family(content)
    for name, allowed in (FIXED | dict(family.fixed)).items():
        if content.get(name, allowed[0]) not in allowed:
            raise _Refused(f"{name}={shown(content[name])}: not supported for {family.model_type}; expected "
                           f"{' or '.join(map(shown, allowed))}")
    values: dict[str, Any] = {}
    for name, key, value in _plain_fields(content, family):
        if values.setdefault(key, value) != value:
            raise _Refused(f"{name}={shown(content.get(name, value))}: biases in some linear layers of a block and not in others "
                           "are not supported")
    pad_token = 1
    if family.pads_first:
        pad_token = _whole(content, "pad_token_id", 1, least=0)
        values["max_length"] -= pad_token + 1
        if values["max_length"] < 1:
            raise _Refused(f"max_position_embeddings={content['max_position_embeddings']}: expected more than the "
                           f"{pad_token + 1} that come before the first position")
    values |= _rope(content, family) | _window(content, family, values["num_layers"])
    _check_heads(values, family)
    heads = _heads(content, family)
    model = ModelSettings(family=family.preset, **values, next_sentence="next_sentence" in (heads or ()))
    labels = _labels(content) if heads is None or "classification" in heads else ()
    problem = _problem(content, labels) if labels else None
    if heads == ("classification",) and problem == "regression":
        heads = ("regression",)
    return Foreign(family, model, heads, problem, labels, pad_token, tuple(_notes(content, family, values)))


def _family(content: dict[str, Any]) -> Family:
    kind = content.get("model_type")
    if kind is None:  # of before 2020: only the class is there
        classes = {name: family for family in FAMILIES.values() for name in family.heads}
        named = next((classes[name] for name in _classes(content) if name in classes), None)
        if named is None:
            raise _Refused(f"model_type is missing; expected one of {', '.join(FAMILIES)}")
        return named
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _Refused(f"model_type={shown(kind)}: not supported; expected one of {', '.join(FAMILIES)}"
                       f"{nearest(str(kind), FAMILIES)}")
    return FAMILIES[kind]


def _classes(content: dict[str, Any]) -> list[str]:
    names = content.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Refused(f"architectures={shown(names)}: expected a list of class names")
    return names


def _heads(content: dict[str, Any], family: Family) -> tuple[str, ...] | None:
    names = _classes(content)
    if not names:
        return None
    if names[0] not in family.heads:
        raise _Refused(f"architectures={shown(names)}: not supported; expected one of {', '.join(family.heads)}"
                       f"{nearest(names[0], family.heads)}")
    return family.heads[names[0]]


def _plain_fields(content: dict[str, Any], family: Family) -> Iterator[tuple[str, str, Any]]:
    """(field, key, value) of every row of the family's table."""
    for name, field in family.fields.items():
        value = content.get(name, field.default)
        if field.values is not None:
            if not isinstance(value, str) or value not in field.values:
                raise _Refused(f"{name}={shown(value)}: not supported for {family.model_type}; expected one of "
                               f"{', '.join(field.values)}{nearest(str(value), field.values)}")
            value = field.values[value]
        elif isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise _Refused(f"{name}={shown(value)}: expected true or false")
        elif isinstance(field.default, float):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise _Refused(f"{name}={shown(value)}: expected a number from 0 to 1")
        elif value is not None or field.default is not None:
            value = _whole(content, name, field.default, least=0 if name == "type_vocab_size" else 1)
        yield name, field.key, value


def _whole(content: dict[str, Any], name: str, default: int | None, least: int = 1) -> int:
    value = content.get(name, default)
    if type(value) is not int or not least <= value < 2**31:
        raise _Refused(f"{name}={shown(value)}: expected a whole number from {least} on")
    return value


def _number(content: dict[str, Any], name: str, default: float | None, where: str = "") -> float:
    value = content.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise _Refused(f"{where}{name}={shown(value)}: expected a number above 0")
    return float(value)


def _check_heads(values: dict[str, Any], family: Family) -> None:
    names = {field.key: name for name, field in family.fields.items()}
    width, heads, keys = values["hidden_size"], values["num_heads"], values.get("num_kv_heads") or values["num_heads"]
    if not values.get("head_dim") and width % heads:
        raise _Refused(f"{names['num_heads']}={heads}: does not divide {names['hidden_size']}={width}")
    if heads % keys:
        raise _Refused(f"{names['num_kv_heads']}={keys}: does not divide {names['num_heads']}={heads}")


def _mapping(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name) or {}
    if not isinstance(value, dict):
        raise _Refused(f"{name}={shown(value)}: expected a mapping")
    return value


def _rope(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Keys of the rotary positions: transformers 5 has them in rope_parameters, 4 in fields of their own."""
    if family.rope is None:
        return {}
    new = "rope_parameters" if content.get("rope_parameters") else "rope_scaling"
    given = _mapping(content, new)
    if family.rope == "flat":
        return {"rope_theta": _number(given, "rope_theta", content.get("rope_theta", 10000.0)),
                "rope_scaling": _scaling(given, new)}
    found = {}
    for key, old, default, layers in (("rope_theta", "global_rope_theta", 160000.0, FULL),
                                      ("local_rope_theta", "local_rope_theta", 10000.0, SLIDING)):
        own = _mapping(given, layers) if new == "rope_parameters" else given
        if _scaling(own, new) is not None:
            raise _Refused(f"{new}={shown(given)}: not supported for {family.model_type}; expected the type default")
        found[key] = _number(own, "rope_theta", content.get(old, default))
    return found


def _scaling(given: dict[str, Any], field: str) -> dict[str, Any] | None:
    """model.rope_scaling."""
    name = "rope_type" if "rope_type" in given else "type"
    kind = given.get(name, "default")
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise _Refused(f"{field}.{name}={shown(kind)}: not supported; expected one of default, {', '.join(SCALINGS)}")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise _Refused(f"{field}.partial_rotary_factor={shown(given['partial_rotary_factor'])}: not supported; expected 1.0")
    return {"type": kind} | {ours: _number(given, theirs, None, f"{field}.") for theirs, ours in SCALINGS[kind].items()}


def _window(content: dict[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """Which layers see how far."""
    if family.window is None:
        return {}
    if family.window == "modernbert":
        size, name, every = _whole(content, "local_attention", 128), "global_attn_every_n_layers", 3
        every = _whole(content, name, every)
        kinds = [SLIDING if layer % every else FULL for layer in range(layers)]
    else:
        size = content.get("sliding_window", 4096)
        if family.window == "qwen" and not content.get("use_sliding_window", False):
            size = None
        size = size if size is None else _whole(content, "sliding_window", size)
        first = _whole(content, "max_window_layers", 28, least=0) if family.window == "qwen" else 0
        kinds = [SLIDING if size is not None and layer >= first else FULL for layer in range(layers)]
    given = content.get("layer_types")
    if given is not None:
        if not isinstance(given, list) or len(given) != layers or any(kind not in (FULL, SLIDING) for kind in given):
            raise _Refused(f"layer_types={shown(given)}: expected {layers} times {FULL} or {SLIDING}")
        kinds = given
    every = _every(kinds)
    if every == 0 or (size is None and every != 1):
        raise _Refused(f"{'layer_types' if given is not None else 'max_window_layers'}: global layers at "
                       f"{clipped(str([layer for layer, kind in enumerate(kinds) if kind == FULL]))} are not supported; expected "
                       "every n-th, from the first on")
    known = PRESETS[family.preset]["attention_window"]
    if size is None and known is None:
        return {}
    return {"attention_window": known if size is None else size, "global_every": every}  # null would be the family's


def _every(kinds: Sequence[str]) -> int | None:
    """n, where layers 0, n, 2n, ... see everything and no others do; None: none does; 0: it is another pattern."""
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    if not full:
        return None
    every = full[1] if len(full) > 1 else len(kinds)
    return every if full == list(range(0, len(kinds), every)) else 0


def _labels(content: dict[str, Any]) -> tuple[str, ...]:
    """Names of a classifier's outputs, by their number."""
    named = content.get("id2label")
    if named is None:
        count = _whole(content, "num_labels", 2)
        return tuple(f"LABEL_{number}" for number in range(count))
    if not isinstance(named, dict) or set(named) != {str(number) for number in range(len(named))}:
        raise _Refused(f"id2label={shown(named)}: expected names of the numbers from 0 on")
    return tuple(str(named[str(number)]) for number in range(len(named)))


def _problem(content: dict[str, Any], labels: Sequence[str]) -> str | None:
    kind = content.get("problem_type")
    if kind is None:
        return "regression" if len(labels) == 1 else None
    if not isinstance(kind, str) or kind not in PROBLEMS:
        raise _Refused(f"problem_type={shown(kind)}: expected one of {', '.join(PROBLEMS)}{nearest(str(kind), PROBLEMS)}")
    return PROBLEMS[kind]


def _notes(content: dict[str, Any], family: Family, values: dict[str, Any]) -> Iterator[str]:
    for name in ("embd_pdrop", "embedding_dropout", "classifier_dropout", "seq_classif_dropout"):
        value = content.get(name)
        if value is not None and value != values.get("dropout", 0.0):
            yield f"{name}={value} is not taken over: model.dropout={values.get('dropout', 0.0)} is for every place"


# ---- writing ---------------------------------------------------------------------------------------------------------

def find_family(model: ModelSettings, heads: Sequence[str]) -> Family:
    """The family of transformers that can hold this model: its own, or another that has the same layers. Raises
    UserError, naming the key for which there is none."""
    if model.family in TRUNKS:
        raise UserError(f"model.family={model.family}: no family of transformers that is known here has such a trunk")
    own = [family for family in FAMILIES.values() if family.preset == model.family]
    problems = []
    for family in [*own, *(family for family in FAMILIES.values() if family not in own)]:
        if class_of(family, heads) is None:
            problems.append((100, f"heads.{', heads.'.join(heads) or 'none'}: {family.model_type} has no such class"))
            continue
        wanted = decisive(model)
        found = decisive(parse(write_fields(family, model, 1)).model)
        different = [key for key, value in wanted.items() if found[key] != value]
        if not different:
            return family
        key = different[0]
        problems.append((len(different), f"model.{key}={shown(wanted[key])}: {family.model_type} has {shown(found[key])}"))
    nearest_one = min(problems, key=lambda problem: problem[0])[1]
    raise UserError(f"{nearest_one}; no family of transformers that is known here holds this model")


def class_of(family: Family, heads: Sequence[str]) -> str | None:
    """The class of transformers that has exactly these heads; scores are a classifier's, there."""
    wanted = {"classification" if head == "regression" else head for head in heads}
    return next((name for name, each in family.heads.items() if set(each) == wanted), None)


def decisive(model: ModelSettings) -> dict[str, Any]:
    """What a model computes, by key: without what has no effect, numbers that are derived filled in."""
    values = {key: value for key, value in dataclasses.asdict(model).items() if key not in WITHOUT_EFFECT}
    values |= {"num_kv_heads": kv_heads(model), "head_dim": head_dim(model), "intermediate_size": intermediate_size(model),
               "pooling": pooling(model)}
    if model.positions == "learned":
        values |= dict.fromkeys(("rope_theta", "local_rope_theta", "rope_scaling"))
    if model.normalization == "rmsnorm":
        values["norm_bias"] = None
    every, size = model.global_every, model.attention_window
    near = [size is not None and (every is None or layer % every > 0) for layer in range(model.num_layers)]
    if not any(near) or size // (1 if model.causal else 2) >= model.max_length:
        values |= dict.fromkeys(("attention_window", "global_every", "local_rope_theta"))
    else:
        values["global_every"] = [layer for layer, is_near in enumerate(near) if not is_near]
    return values


def write_fields(family: Family, model: ModelSettings, pad_token: int) -> dict[str, Any]:
    """config.json of a model, as far as `parse` goes by it. Values that the family has no word for get its own: what is
    read back differs, then."""
    derived = {"num_kv_heads": kv_heads(model), "head_dim": head_dim(model), "intermediate_size": intermediate_size(model),
               "pooling": pooling(model)}
    content: dict[str, Any] = {"model_type": family.model_type}
    for name, field in family.fields.items():
        value = derived.get(field.key, getattr(model, field.key))
        if field.key == "attention_dropout" and value is None:
            value = model.dropout
        if field.values is not None:
            value = next((word for word, ours in field.values.items() if ours == value), field.default)
        content[name] = value
    content |= {name: allowed[0] for name, allowed in family.fixed.items()}
    if family.pads_first:
        content |= {"pad_token_id": pad_token, "max_position_embeddings": model.max_length + pad_token + 1}
    if family.rope == "flat":
        scaling = model.rope_scaling
        content["rope_theta"] = model.rope_theta
        if scaling:
            content["rope_scaling"] = {"rope_type": scaling["type"]} | {
                theirs: int(scaling[ours]) if ours == "original_max_length" else scaling[ours]  # transformers 4 wants it whole
                for theirs, ours in SCALINGS[scaling["type"]].items()}
    elif family.rope == "two":
        content |= {"global_rope_theta": model.rope_theta, "local_rope_theta": model.local_rope_theta}
    return content | _written_window(family, model)


def _written_window(family: Family, model: ModelSettings) -> dict[str, Any]:
    every, size = model.global_every, model.attention_window
    if family.window == "modernbert":  # where no layer sees everything, there is no number for it
        return {"local_attention": size or 128, "layer_types": _kinds(model),
                **({} if every is None else {"global_attn_every_n_layers": every})}
    if every == 1:
        size = None
    if family.window == "mistral":
        return {"sliding_window": size}
    if family.window == "qwen":
        mixed = {"layer_types": _kinds(model)} if size and every else {}
        return {"use_sliding_window": size is not None, "sliding_window": size, **mixed,
                "max_window_layers": 0 if size else model.num_layers}
    return {}


def _kinds(model: ModelSettings) -> list[str]:
    every = model.global_every
    return [SLIDING if model.attention_window and (every is None or layer % every) else FULL
            for layer in range(model.num_layers)]


def written(family: Family, model: ModelSettings, heads: Sequence[str], problem: str | None, labels: Sequence[str],
            special_ids: dict[str, int]) -> dict[str, Any]:
    """The whole config.json of an export. `special_ids`: pad_token_id and such, those that the tokenizer has."""
    fields = write_fields(family, model, special_ids.get("pad_token_id", 1))
    content = {"architectures": [class_of(family, heads)], **fields, **special_ids, "torch_dtype": "float32"}
    if labels:
        content |= {"id2label": {str(number): str(name) for number, name in enumerate(labels)},
                    "label2id": {str(name): number for number, name in enumerate(labels)}}
    if problem:
        content["problem_type"] = next(name for name, ours in PROBLEMS.items() if ours == problem)
    return content
