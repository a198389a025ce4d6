"""The parts of a Hugging Face `tokenizer.json`, as plain data.

A tokenizer is a pipeline: added tokens are cut out of the text, the normalizer rewrites it, the pre-tokenizer cuts it,
the model looks the cuts up, the post-processor puts special tokens around the ids; the decoder turns them back.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxlm.data.framing import Framing

Json = dict[str, Any]

BYTE_LEVEL_DECODER: Json = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def document(model: Json, *, added: Iterable[Json] = (), normalizer: Json | None = None, pre_tokenizer: Json | None = None,
             post_processor: Json | None = None, decoder: Json | None = None) -> bytes:
    """The whole file."""
    added = sorted(added, key=lambda token: token["id"])
    return (json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
                        "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model},
                       ensure_ascii=False) + "\n").encode()


def added_token(number: int, content: str, special: bool = True, **properties: bool) -> Json:
    """`properties`: single_word, lstrip, rstrip, normalized, where they are not the usual ones."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": number, "content": content, **usual, **properties, "special": special}


# --------------------------------------------------------------------------------------------------------------- models

def wordpiece(vocabulary: Mapping[str, int], unknown: str) -> Json:
    return {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": dict(vocabulary)}


def bpe(vocabulary: Mapping[str, int], merges: Iterable[Sequence[str]], *, unknown: str | None = None, fuse_unknown: bool = False,
        byte_fallback: bool = False, affixes: str | None = None, ignore_merges: bool = False) -> Json:
    """`affixes`: "" as GPT-2's file has it, None as Llama's; both mean none."""
    return {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": affixes,
            "end_of_word_suffix": affixes, "fuse_unk": fuse_unknown, "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges, "vocab": dict(vocabulary), "merges": [list(merge) for merge in merges]}


def unigram(pieces: Iterable[tuple[str, float]], unknown: int, byte_fallback: bool = False) -> Json:
    return {"type": "Unigram", "unk_id": unknown, "vocab": [list(piece) for piece in pieces], "byte_fallback": byte_fallback}


def word_level(vocabulary: Mapping[str, int], unknown: str) -> Json:
    """Whole cuts, or an error where `unknown` is no token."""
    return {"type": "WordLevel", "vocab": dict(vocabulary), "unk_token": unknown}


# --------------------------------------------------------------------------- normalizers, pre-tokenizers, decoders

def sequence(kind: str, parts: Sequence[Json]) -> Json | None:
    """One part of several; kind: normalizers, pretokenizers or decoders, as the file names the list."""
    return {"type": "Sequence", kind: list(parts)} if len(parts) > 1 else next(iter(parts), None)


def replace(pattern: str | Json, content: str) -> Json:
    return {"type": "Replace", "pattern": {"String": pattern} if isinstance(pattern, str) else pattern, "content": content}


def split(pattern: str, behavior: str = "Isolated") -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def byte_level(add_prefix_space: bool = False, use_regex: bool = True) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def metaspace(scheme: str, split: bool = True) -> Json:
    """scheme: always, first or never: before which cuts a blank is put."""
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}


def strip_start() -> Json:
    """A decoder that takes the first blank away."""
    return {"type": "Strip", "content": " ", "start": 1, "stop": 0}


# ------------------------------------------------------------------------------------------------- post-processors

Place = tuple[str, int]  # a special token's name, or $A or $B for a text; and its token type


def template(single: Sequence[Place], pair: Sequence[Place], ids: Mapping[str, int]) -> Json:
    """What is put around one text and around two; `ids` of the special tokens."""
    def parts(places: Sequence[Place]) -> list[Json]:
        return [{"Sequence": {"id": name[1:], "type_id": kind}} if name in ("$A", "$B")
                else {"SpecialToken": {"id": name, "type_id": kind}} for name, kind in places]

    used = sorted({name for name, _ in (*single, *pair)} - {"$A", "$B"})
    return {"type": "TemplateProcessing", "single": parts(single), "pair": parts(pair),
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in used}}


def framed(framing: Framing, names: Mapping[int, str]) -> Json:
    """The template of a framing; `names` of its tokens."""
    first, second = framing.token_types

    def places(tokens: Sequence[int], kind: int) -> list[Place]:
        return [(names[token], kind) for token in tokens]

    opened = [*places(framing.start, first), ("$A", first)]
    pair = [*opened, *places(framing.middle, first), ("$B", second), *places(framing.end, second)]
    ids = {names[token]: token for token in (*framing.start, *framing.middle, *framing.end)}
    return template([*opened, *places(framing.end, first)], pair, ids)


def roberta(cls: tuple[str, int], sep: tuple[str, int], trim_offsets: bool, add_prefix_space: bool) -> Json:
    """<s> A </s></s> B </s>, all of type 0."""
    return {"type": "RobertaProcessing", "sep": list(sep), "cls": list(cls), "trim_offsets": trim_offsets,
            "add_prefix_space": add_prefix_space}
