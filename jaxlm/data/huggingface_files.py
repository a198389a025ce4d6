"""The files of a Hugging Face folder that say something of its tokenizer, and where they contradict each other."""

import json
from collections.abc import Mapping
from typing import Any

from jaxlm.errors import UserError, shown

CONFIG, MAP, ADDED, MODEL_CONFIG = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"
TOKENIZER, WORDS, VOCABULARY, MERGES = "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"
MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # SentencePiece's, as different models name it
# What goes with a tokenizer, and out again with an export.
BESIDE = (CONFIG, MAP, ADDED, WORDS, VOCABULARY, MERGES, "chat_template.jinja", *MODELS)
NOT_READ = ("tekken.json", ".tiktoken", "bpe.codes", "vocab.bpe", "encoder.json")  # vocabularies of still other kinds
# What tokenizer_config.json says of BERT's normalizer, and what tokenizer.json calls it.
NORMALIZATION = {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}


def text_of(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start})") from error


def words_of(files: Mapping[str, bytes]) -> dict[str, int]:
    """vocab.txt: a token a line, whose number is its id; blanks at its end do not count. Of two the last."""
    lines = text_of(files, WORDS).removesuffix("\n").split("\n")
    return {line.rstrip(): number for number, line in enumerate(lines)}


def object_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected a JSON object")
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: half of a surrogate pair ({error.object[error.start]!a}), which is no character") from error
    return content


def refuse_contradictions(files: Mapping[str, bytes], vocabulary: Mapping[str, int]) -> None:
    """UserError where an older file gives a token another id than `tokenizer.json`, or asks for another normalization.

    Args:
      files: name -> content; nothing is refused without a `tokenizer.json`.
      vocabulary: of `tokenizer.json`, with added tokens.
    """
    def refuse(name: str, what: str, one: Any, other: Any) -> None:
        raise UserError(f"{name} and {TOKENIZER} contradict each other: {what} is {one} in one, {other} in the other; "
                        "change or remove the one that is not the model's")

    if TOKENIZER not in files:
        return
    for name in (VOCABULARY, ADDED):
        for token, number in object_of(files, name).items():
            if vocabulary.get(token, number) != number:
                refuse(name, shown(token), shown(number), vocabulary[token])
    for word, number in words_of(files).items() if WORDS in files else ():
        if vocabulary.get(word, number) != number:
            refuse(WORDS, shown(word), number, vocabulary[word])
    refuse_other_decoder(files, vocabulary)
    config, normalizer = object_of(files, CONFIG), object_of(files, TOKENIZER).get("normalizer") or {}
    for key, name in NORMALIZATION.items() if normalizer.get("type") == "BertNormalizer" else ():
        wanted, found = config.get(key), normalizer.get(name)
        if wanted is not None and wanted != found and not (key == "strip_accents" and found is None):
            refuse(CONFIG, key, json.dumps(wanted), f"{json.dumps(found)} ({name})")


def refuse_other_decoder(files: Mapping[str, bytes], vocabulary: Mapping[str, int]) -> None:
    """UserError where added_tokens_decoder gives a token of `tokenizer.json` another id."""
    decoder = object_of(files, CONFIG).get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        name = token.get("content") if isinstance(token, dict) else None
        if isinstance(name, str) and str(vocabulary.get(name, number)) != number:
            raise UserError(f"{CONFIG} and {TOKENIZER} contradict each other: {shown(name)} is {number} in one "
                            f"(added_tokens_decoder), {vocabulary[name]} in the other; change the one that is not the model's")
