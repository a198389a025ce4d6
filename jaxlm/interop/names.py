"""Names of tensors as files have them, old ones and new ones, and which of them belong to a head. No JAX."""

import re
from collections.abc import Collection, Mapping, Sequence

from jaxlm.errors import UserError
from jaxlm.interop.families import Family
from jaxlm.interop.safetensors import Tensor

# Causal masks, position numbers and frequencies, which old files keep among the weights.
BUFFERS = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|embeddings\.(position_ids|token_type_ids)|rotary_emb\.inv_freq)$")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of torch's parallel and compiled modules


def shown_names(names: Sequence[str]) -> str:
    """The first, and how many more there are."""
    return f"'{names[0]}'" + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def plain_names(family: Family, tensors: Mapping[str, Tensor], expected: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the names that transformers gives them today, and the names of buffers, which are left out."""
    found: dict[str, Tensor] = {}
    buffers = []
    known = expected | head_names(family)
    for given, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.(gamma|beta)$", lambda found: f"LayerNorm.{'weight' if found[1] == 'gamma' else 'bias'}",
                      WRAPPERS.sub("", given))
        if name not in known and family.prefix + name in known:
            name = family.prefix + name
        if BUFFERS.search(name) and name not in expected:
            buffers.append(given)
            continue
        if name in found:
            raise UserError(f"{tensor.file}: weight '{given}' is also there as '{found[name].name}'")
        found[name] = tensor
    return found, buffers


def head_names(family: Family, leaves: Sequence[str] = ("weight", "bias")) -> set[str]:
    """Every tensor of every head that the family's classes have."""
    heads = {path.split(".")[1] for path in family.names if path.startswith("heads.")}
    found = {name for head in heads for name in names_of_head(family, head, leaves)}
    return found | {f"{name}.{leaf}" for name in family.ignored for leaf in leaves} | set(family.twins.values())


def names_of_head(family: Family, head: str, leaves: Sequence[str]) -> set[str]:
    """Tensors of a head: those that the table names, and of the modules that it names these leaves."""
    own = {path: name for path, name in family.names.items() if path.startswith(f"heads.{head}.") or path == f"heads.{head}"}
    whole = {name for path, name in own.items() if path.endswith((".bias", ".embedding"))}
    return {name for name in whole if name} | {f"{name}.{leaf}" for name in own.values() if name not in whole for leaf in leaves}


def head_is_there(family: Family, head: str, names: Collection[str]) -> bool:
    """Whether files with these tensors have a head; what may be a copy of the embeddings need not be there."""
    copies = {"heads.masked_token.table.embedding", *family.twins}
    tied = {name for path, name in family.names.items() if path in copies}
    plain = {WRAPPERS.sub("", name) for name in names}
    plain |= {family.prefix + name for name in plain}
    plain |= {name.replace("LayerNorm.gamma", "LayerNorm.weight") for name in plain}
    return names_of_head(family, head, ["weight"]) - tied <= plain
