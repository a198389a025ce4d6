"""Which tokens of a vocabulary have a role: what files beside a tokenizer declare, and how such tokens are usually
spelled."""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxlm.console.progress import print_once
from jaxlm.errors import UserError, shown
from jaxlm.storage.files import Location, exists, read_text

# Variants in case, brackets and separators count as the same: <|EOS_TOKEN|> is <eos_token>.
SPELLINGS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<pad_token>"),
    "unk": ("<unk>", "[UNK]", "<unk_token>"),
    "bos": ("<s>", "[BOS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "<bos_token>",
            "<|beginoftext|>", "<|start_of_text|>", "<|begin_of_document|>"),
    "eos": ("</s>", "[EOS]", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<eos_token>",
            "<|end_of_document|>", "<|eod|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
}
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|endofturn|>", "<|end_of_turn_token|>",
             "<|eom_id|>", "<turn|>", "<|return|>", "<|end_of_message|>")
# Where roles are declared; of two that disagree, the first, unless it lacks what newer versions of transformers write
# (NEWER): then special_tokens_map.json goes before it. A fine-tuned model's config.json is often its base model's.
DECLARING = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")

NEWER = "added_tokens_decoder"

Declared = Mapping[str, Sequence[str | int]]  # role -> names or ids, the most trusted first


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that no text encodes to; None where the tokenizer has none."""

    pad: int | None = None
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(token for token in asdict(self).values() if token is not None)


def token_name(token: Any) -> str | None:
    """The token that a file names: as text, or as an object with its properties."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def declared_tokens(folder: Location) -> Declared:
    """What the JSON files that lie beside a tokenizer say of its roles. Raises UserError for one that is no JSON
    object."""
    declared: dict[str, list[str | int]] = {role: [] for role in SPELLINGS}
    contents = {name: declaring_object(folder / name) for name in DECLARING}
    first, second, *others = DECLARING
    warn_of_two(contents, first, second)
    order = (first, second, *others) if NEWER in contents[first] else (second, first, *others)
    for content in map(contents.get, order):
        for role, found in declared.items():
            ids = content.get(f"{role}_token_id")
            found += [each for each in (token_name(content.get(f"{role}_token")), *(ids if isinstance(ids, list) else [ids]))
                      if isinstance(each, str | int) and not isinstance(each, bool)]
    return declared


def declaring_object(file: Location) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file)) if exists(file) else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file.name}: expected a JSON object with the special tokens")
    return content


def warn_of_two(contents: Mapping[str, Mapping[str, Any]], first: str, second: str) -> None:
    """A line for each role for which the two files beside a tokenizer name different tokens."""
    used = first if NEWER in contents[first] else second
    for role in SPELLINGS:
        one, other = (token_name(contents[name].get(f"{role}_token")) for name in (first, second))
        if one and other and one != other:
            print_once(f"WARNING: {role}_token is {shown(one)} in {first}, {shown(other)} in {second}; as in transformers, "
                       f"{used} counts")


def find_special(vocabulary: Mapping[str, int], marks: Iterable[str], declared: Declared) -> SpecialTokens:
    """The token of each role: as declared, else by its spelling; cls and bos, sep and eos stand in for each other.

    Text is a sequence of documents: for eos, what ends a document goes before what ends a turn of a chat, wherever
    it is found.

    Args:
      vocabulary: token -> id.
      marks: the tokens that the tokenizer itself sets apart (added, control). Only these may be spelled in an
      unusual way, and
        only these can be meant by a bare id: configs carry ids on from other models.
      declared: see `declared_tokens`.
    """
    usual = {spelling for spellings in SPELLINGS.values() for spelling in spellings}
    apart = {name for name in marks if not name[:1].isalnum()}
    by_form: dict[str, int] = {}
    for token, name in sorted((vocabulary[name], name) for name in vocabulary if name in usual or name in apart):
        by_form.setdefault(form(name), token)
    names = {token: name for name, token in vocabulary.items()}

    def spelled(spellings: Sequence[str]) -> list[int]:
        exact = [vocabulary[spelling] for spelling in spellings if spelling in vocabulary]
        return exact + [by_form[form(spelling)] for spelling in spellings if form(spelling) in by_form]

    def given(role: str) -> list[int]:
        tokens = [vocabulary.get(each) if isinstance(each, str) else each if names.get(each) in apart else None
                  for each in declared.get(role, ())]
        return [token for token in tokens if token is not None]

    roles = {role: next(iter(given(role) + spelled(spellings)), None) for role, spellings in SPELLINGS.items()}
    turns = {form(name) for name in TURN_ENDS}
    ends = [token for token in given("eos") if form(names[token]) not in turns]
    roles["eos"] = next(iter(ends + spelled(SPELLINGS["eos"]) + given("eos") + spelled(TURN_ENDS)), None)
    for one, other in (("cls", "bos"), ("sep", "eos")):
        roles[one], roles[other] = (roles[one] if roles[one] is not None else roles[other],
                                    roles[other] if roles[other] is not None else roles[one])
    return SpecialTokens(**roles)


def form(name: str) -> str:
    """What a special token's name says, whatever its case, brackets and separators: <|end_of_text|> is endoftext."""
    return "".join(letter for letter in unicodedata.normalize("NFKC", name).lower() if letter.isalpha() or letter == "/")
