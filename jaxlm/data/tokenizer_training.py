"""Trains the tokenizers that are not simply given: unigram and BPE with SentencePiece, WordPiece with `tokenizers`.

The same texts give the same bytes on any machine: threads, ties and paths are kept from leaving a trace.
"""

import io
import re
import tempfile
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

from jaxlm.console.progress import print_line
from jaxlm.data import tokenizers as ours
from jaxlm.data.tokenizers import JsonTokenizer, SentencePieceTokenizer, SpecialTokens
from jaxlm.errors import UserError

LINE_CHARACTERS = 16384  # longer lines are cut for training: the trainers drop or choke on very long ones
THREADS = 8  # fixed: the number of threads decides the order of summation, and stands in the trained model
WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Of the characters that occur, those that make up this share of the text always get tokens of their own: what
# SentencePiece recommends for scripts of many characters (its character_coverage). The others do as far as half of
# the vocabulary holds them.
CHARACTER_COVERAGE = Fraction("0.9995")
ALPHABET_SHARE = Fraction(1, 2)
# Scores of unigram pieces are rounded to multiples of this: then sums of them are exact in 32 bits (for some hundred
# thousand characters), and equally good ways to cut a text stay so in whatever order they are summed. With rounding
# errors the choice would be SentencePiece's alone, and no other library could give the same tokens.
SCORE_STEP = 2.0**-6
LONGEST_WORD = 500  # letters; longer ones are cut. WordPiece's search takes the square of it, and gives up at 100 unless told


def train_tokenizer(kind: str, texts: Sequence[str], vocab_size: int, lowercase: bool = False) -> ours.Tokenizer:
    """Trains `unigram` (Kudo 2018), `bpe` (Sennrich et al. 2016) or `wordpiece` (Schuster and Nakajima 2012) to a size.

    unigram and bpe encode any text without loss, unless `lowercase`, which also strips accents. wordpiece normalizes
    like BERT, and has no token for characters that are too rare to get one. UserError when the texts cannot fill, or
    do not fit, that many tokens.
    """
    if not any(text.strip() for text in texts):
        raise UserError(f"data.tokenizer: there is no text to train a {kind} tokenizer on")
    if kind == "wordpiece":
        return train_wordpiece(texts, vocab_size, lowercase)
    return train_sentencepiece(kind, texts, vocab_size, lowercase)


def lines(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start:start + LINE_CHARACTERS]


def train_sentencepiece(kind: str, texts: Sequence[str], vocab_size: int, lowercase: bool) -> SentencePieceTokenizer:
    """<pad>=0, <unk>=1, <s>=2, </s>=3, <mask>=4, the newline, 256 bytes for what has no piece, then the learned
    pieces."""
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="ascii") as rules:
        normalization = {"normalization_rule_name": "identity"}
        if lowercase:
            rules.writelines(lowercase_rules())
            rules.flush()
            normalization = {"normalization_rule_tsv": rules.name}
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(texts), model_writer=model, model_type=kind, vocab_size=vocab_size,
                pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols=["<mask>"], user_defined_symbols=["\n"],
                add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, byte_fallback=True,
                max_sentence_length=4 * LINE_CHARACTERS, num_threads=THREADS, minloglevel=3, **normalization)
        except RuntimeError as error:
            raise UserError(vocabulary_error(kind, vocab_size, error)) from error
    proto = ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.normalization_rule_tsv = ""  # the rules are compiled in; the file's name would change the digest
    for piece in proto.pieces if kind == "unigram" else ():
        piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    special = SpecialTokens(pad=0, unk=1, bos=2, cls=2, eos=3, sep=3, mask=4)
    return SentencePieceTokenizer({ours.MODEL_FILE: proto.SerializeToString(deterministic=True)}, special)


def vocabulary_error(kind: str, vocab_size: int, error: RuntimeError) -> str:
    """One line that says the nearest possible size, which SentencePiece's own message holds."""
    if largest := re.search(r"value <= (\d+)", str(error)):
        return size_error(kind, vocab_size, f"the text gives at most {largest[1]} tokens")
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return size_error(kind, vocab_size, f"the text needs at least {smallest[1]} tokens")
    return f"model.vocab_size: {vocab_size}: the {kind} tokenizer could not be trained ({ours.first_line(error)})"


def size_error(kind: str, vocab_size: int, limit: str) -> str:
    return f"model.vocab_size: {vocab_size} does not fit a {kind} tokenizer for this text: {limit}"


def lowercase_rules() -> Iterator[str]:
    """SentencePiece rules (code points in hexadecimal, source TAB target) that lowercase and drop accents, for all
    of Unicode."""
    for code in (*range(1, 0xD800), *range(0xE000, 0x110000)):
        character = chr(code)
        decomposed = unicodedata.normalize("NFD", character.lower())
        target = unicodedata.normalize("NFC", "".join(part for part in decomposed if unicodedata.category(part) != "Mn"))
        if target != character:
            yield f"{code:X}\t{' '.join(f'{ord(part):X}' for part in target)}\n"


def train_wordpiece(texts: Sequence[str], vocab_size: int, lowercase: bool) -> JsonTokenizer:
    """[PAD]=0, [UNK]=1, [CLS]=2, [SEP]=3, [MASK]=4, continuing characters, characters, then the learned pieces.

    Left alone, the trainer numbers continuing characters, and breaks ties, in the order of a randomly seeded hash
    table. Given all of them in order beforehand, it has no choice left.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def wordpiece(model: models.WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(rf"\S{{{LONGEST_WORD}}}"), "isolated")])
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    def train(first: list[str]) -> dict[str, int]:
        required = [*WORDPIECE_SPECIAL, *(f"##{character}" for character in first if character in inside)]
        smallest = len(required) + len(first)
        if vocab_size < smallest:
            raise UserError(size_error("wordpiece", vocab_size, f"the text needs at least {smallest} tokens"))
        trained = wordpiece(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
        trained.train_from_iterator(lines(texts), trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=required, initial_alphabet=first, limit_alphabet=len(first),
            show_progress=False))
        return trained.get_vocab()

    count, inside = characters(wordpiece(models.WordPiece()), texts)
    first = alphabet(count, inside, ALPHABET_SHARE * vocab_size)
    vocabulary = train(first)
    if len(vocabulary) < vocab_size:  # there is room for more characters
        first = alphabet(count, inside, vocab_size - len(WORDPIECE_SPECIAL))
        vocabulary = train(first)
    if len(vocabulary) < vocab_size:
        raise UserError(size_error("wordpiece", vocab_size, f"the text gives at most {len(vocabulary)} tokens"))
    warn_of_characters_left_out(count, first)
    tokenizer = wordpiece(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in WORDPIECE_SPECIAL])
    special = SpecialTokens(pad=0, unk=1, bos=2, cls=2, eos=3, sep=3, mask=4)
    return JsonTokenizer({ours.JSON_FILE: tokenizer.to_str(pretty=True).encode()}, special)


def characters(tokenizer: Any, texts: Sequence[str]) -> tuple[Counter[str], set[str]]:
    """How often each character occurs in the normalized text, and those that occur inside a word."""
    words: Counter[str] = Counter()
    for line in lines(texts):
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(line)))
    count: Counter[str] = Counter()
    inside: set[str] = set()
    for word, frequency in words.items():
        inside.update(word[1:])
        for character in word:
            count[character] += frequency
    return count, inside


def alphabet(count: Counter[str], inside: set[str], room: Fraction | int) -> list[str]:
    """The characters that get tokens, sorted: CHARACTER_COVERAGE of the text, and more of them while `room` tokens
    hold them."""
    by_frequency = sorted(count, key=lambda character: (-count[character], character))
    reached = list(accumulate(count[character] for character in by_frequency))
    tokens = list(accumulate(2 if character in inside else 1 for character in by_frequency))
    needed = bisect_left(reached, CHARACTER_COVERAGE * count.total()) + 1
    return sorted(by_frequency[:max(needed, bisect_right(tokens, room))])


def warn_of_characters_left_out(count: Counter[str], kept: list[str]) -> None:
    left_out = sorted(set(count).difference(kept))
    if left_out:
        times = sum(count[character] for character in left_out)
        print_line(f"WARNING: wordpiece: {len(left_out):,} of {len(count):,} characters get no token ({times:,} of the sample's "
                   f"{count.total():,}), and words that hold one become [UNK]: {''.join(left_out[:40])}"
                   f"{'...' if len(left_out) > 40 else ''}; a larger model.vocab_size keeps more")
