"""A SentencePiece model as the parts of a `tokenizer.json` that give the same ids.

The two libraries differ in what their vocabularies are for: in SentencePiece control tokens and bytes are never found
in text, in `tokenizers` every name is. And SentencePiece writes a blank as U+2581 and cannot tell the two apart.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxlm.data import tokenizer_json as parts
from jaxlm.data.tokenizer_json import Json
from jaxlm.errors import UserError

MARK = "\u2581"  # a blank inside a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models
# `tokenizers` takes a letter and its marks together, and when the letter has a rule, the marks are lost. A fence
# between them keeps them apart. It stands in no text: its code points are no characters.
FENCE = "\ufffe\uffff"
MARKS = r"(?=[\p{M}\x{200C}\x{200D}\x{0E33}\x{0EB3}\x{FF9E}\x{FF9F}\x{1F3FB}-\x{1F3FF}\x{E0020}-\x{E007F}])"

Pieces = Sequence[tuple[str, float]]  # name and score of each, in the order of ids


@dataclass(frozen=True)
class Sentencepiece:
    """What a SentencePiece model's protobuf says."""

    proto: Any

    @staticmethod
    def read(content: bytes, name: str = "tokenizer.model") -> "Sentencepiece":
        """Raises UserError, with the file's name: no such model, or one whose algorithm `tokenizers` does not have."""
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        try:
            proto = ModelProto.FromString(content)
        except DecodeError as error:
            raise UserError(f"{name} is not a SentencePiece model") from error
        if not proto.pieces:
            raise UserError(f"{name} is not a SentencePiece model: it has no pieces")
        if any(isinstance(piece.piece, bytes) for piece in proto.pieces):  # what protobuf gives for text that is not UTF-8
            raise UserError(f"{name} is damaged: a piece is not UTF-8")
        if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
            raise UserError(f"{name} is of words or characters, expected unigram or byte-pair encoding")
        if proto.trainer_spec.treat_whitespace_as_suffix:
            raise UserError(f"{name} has blanks behind words (treat_whitespace_as_suffix), which is not supported")
        return Sentencepiece(proto)

    @property
    def is_bpe(self) -> bool:
        return self.proto.trainer_spec.model_type == BPE

    @cached_property
    def pieces(self) -> Pieces:
        return [(piece.piece, piece.score) for piece in self.proto.pieces]

    def of_type(self, *types: int) -> list[str]:
        return [piece.piece for piece in self.proto.pieces if piece.type in types]

    @property
    def charsmap(self) -> Json | None:
        """Its normalization rules."""
        rules = self.proto.normalizer_spec.precompiled_charsmap
        return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(rules).decode()} if rules else None

    @cached_property
    def rules(self) -> dict[str, str]:
        """The same, each spelled out: what becomes of which characters."""
        return charsmap_rules(self.proto.normalizer_spec.precompiled_charsmap)


def pipeline(found: Sentencepiece, blanks: bool = False) -> dict[str, Json | None]:
    """model, normalizer, pre_tokenizer and decoder.

    Args:
      blanks: pieces are written with real blanks, so that a U+2581 in the text is a character as any other. For
        models that have byte tokens and put no blank before a text.
    """
    spec, prefix = found.proto.normalizer_spec, found.proto.normalizer_spec.add_dummy_prefix
    escaped = spec.escape_whitespaces and not blanks
    normalizers = normalization(found, prefix, escaped)
    whole, reserved = cut_user_defined(found), None if found.is_bpe else cut_reserved(found)
    cuts = [*([parts.split(whole)] if whole else []), *([parts.split(reserved, "MergedWithPrevious")] if reserved else [])]
    model = bpe_model(found, blanks) if found.is_bpe else unigram_model(found, blanks)
    return {"model": model, "normalizer": parts.sequence("normalizers", normalizers),
            "pre_tokenizer": parts.sequence("pretokenizers", cuts), "decoder": byte_fallback_decoder(prefix, escaped)}


def byte_fallback_decoder(prefix: bool, escaped: bool = True) -> Json | None:
    """Blanks for U+2581, characters for bytes, and the first blank away where one was put before the text."""
    found = [*([parts.replace(MARK, " ")] if escaped else []), {"type": "ByteFallback"}, {"type": "Fuse"},
             *([parts.strip_start()] if prefix else [])]
    return parts.sequence("decoders", found)


def normalization(found: Sentencepiece, prefix: bool, escaped: bool) -> list[Json]:
    """Rules, blanks that are too many, the blank before a text, U+2581 for blanks: in SentencePiece's order."""
    steps = rule_steps(found)
    if found.proto.normalizer_spec.remove_extra_whitespaces:  # unescaped, a text is read in the parts between its U+2581
        ends = rf"\A +|[ {MARK}]+\z" if escaped else rf"\A +| +\z| +(?={MARK})|(?<={MARK}) +"
        steps += [parts.replace({"Regex": ends}, ""), parts.replace({"Regex": " {2,}"}, " ")]
    if prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    return [*steps, parts.replace(" ", MARK)] if escaped else steps


def rule_steps(found: Sentencepiece) -> list[Json]:
    """The rules; those that delete a character before the others, since `tokenizers` 0.23 fails at them."""
    if not found.charsmap:
        return []
    longer = {source[0] for source in found.rules if len(source) > 1}
    alone = {source: target for source, target in found.rules.items() if len(source) == 1 and source not in longer}
    deleted, changed = sorted(source for source in alone if not alone[source]), sorted(filter(alone.get, alone))
    steps = [parts.replace({"Regex": one_of(deleted)}, "")] if deleted else []
    if not changed:
        return [*steps, found.charsmap]
    fence = parts.replace({"Regex": f"(?<={one_of(changed)}){MARKS}"}, FENCE)
    return [*steps, fence, found.charsmap, parts.replace(FENCE, "")]


def one_of(characters: Sequence[str]) -> str:
    """A pattern of these (rising) characters."""
    ranges: list[list[int]] = []
    for code in map(ord, characters):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(rf"\x{{{first:X}}}-\x{{{last:X}}}" for first, last in ranges) + "]"


def charsmap_rules(content: bytes) -> dict[str, str]:
    """The rules of a precompiled_charsmap: a double-array trie of UTF-8 (Aoe 1989; darts-clone), whose values are
    places in the texts behind it, each of which ends with a zero byte."""
    size = int.from_bytes(content[:4], "little")
    units, texts = np.frombuffer(content[4:4 + size], "<u4").astype(np.int64), content[4 + size:]
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    labels, letters = units & ((1 << 31) | 0xFF), np.arange(1, 256)
    rules, nodes = {}, [(b"", int(offsets[0]))] if size else []
    while nodes:
        key, node = nodes.pop()
        places = node ^ letters
        for letter in letters[(places < len(units)) & (labels[np.minimum(places, len(units) - 1)] == letters)].tolist():
            place = node ^ letter
            nodes.append((key + bytes([letter]), place ^ int(offsets[place])))
            if units[place] >> 8 & 1:
                start = int(units[place ^ offsets[place]] & ((1 << 31) - 1))
                rules[nodes[-1][0].decode()] = texts[start:texts.index(b"\0", start)].decode()
    return rules


def cut_user_defined(found: Sentencepiece) -> str | None:
    """A pattern of the pieces that are always whole; one character alone is so by itself."""
    names = sorted((name for name in found.of_type(USER_DEFINED) if len(name) > 1), key=len, reverse=True)
    return "|".join(map(re.escape, names)) or None


def cut_reserved(found: Sentencepiece) -> str | None:
    """A pattern of the letters behind which a text that spells a control token or a byte has to be cut.

    Those that no piece has: where each letter has one, the improbable score of such names is enough.
    """
    known = {letter for name in found.of_type(NORMAL, UNUSED) for letter in name}
    rest: dict[tuple[str, str], list[str]] = {}  # what stands before, and the letter -> what stands behind
    for name in found.of_type(UNKNOWN, CONTROL, BYTE):
        place = next((place for place, letter in enumerate(name[:-1]) if letter not in known), None)
        if place is not None:
            rest.setdefault((name[:place], name[place]), []).append(re.escape(name[place + 1:]))
    return "|".join((f"(?<={re.escape(before)})" if before else "") + f"{re.escape(letter)}(?={'|'.join(behind)})"
                    for (before, letter), behind in rest.items()) or None


def named(name: str, blanks: bool) -> str:
    return name.replace(MARK, " ") if blanks else name


def vocabulary(found: Sentencepiece, blanks: bool = False) -> list[str]:
    """The name of each id; control tokens and bytes keep theirs."""
    return [named(piece.piece, blanks and piece.type in (NORMAL, UNUSED, USER_DEFINED)) for piece in found.proto.pieces]


def bpe_model(found: Sentencepiece, blanks: bool) -> Json:
    """Every way to make a piece of two others, the best score first."""
    rank = {named(piece.piece, blanks): (-piece.score, number) for number, piece in enumerate(found.proto.pieces)
            if piece.type == NORMAL}
    merges = sorted((rank[piece], cut, piece[:cut], piece[cut:]) for piece in rank for cut in range(1, len(piece))
                    if piece[:cut] in rank and piece[cut:] in rank)
    ids = {name: number for number, name in enumerate(vocabulary(found, blanks))}
    return parts.bpe(ids, [merge[2:] for merge in merges], unknown=next(iter(found.of_type(UNKNOWN)), None), fuse_unknown=True,
                     byte_fallback=found.proto.trainer_spec.byte_fallback, ignore_merges=cut_user_defined(found) is not None)


def unigram_model(found: Sentencepiece, blanks: bool) -> Json:
    """Control tokens and bytes are so improbable that any other way to spell them is taken."""
    normal = [piece.score for piece in found.proto.pieces if piece.type == NORMAL]
    lowest, highest = min(normal, default=0.0), max(normal, default=0.0)
    longest = max(len(piece) for piece in found.of_type(UNKNOWN, CONTROL, BYTE))
    reserved = (longest + 1) * (lowest - 1)

    def score(piece: Any) -> float:
        if piece.type == USER_DEFINED:  # as SentencePiece has it: better than any other way to cut it
            return len(piece.piece.encode()) * highest - 0.1
        return piece.score if piece.type in (NORMAL, UNUSED) else reserved

    unknown = next(number for number, piece in enumerate(found.proto.pieces) if piece.type == UNKNOWN)
    scores = [score(piece) for piece in found.proto.pieces]
    return parts.unigram(zip(vocabulary(found, blanks), scores, strict=True), unknown,
                         byte_fallback=found.proto.trainer_spec.byte_fallback)
