"""Tokens found by their text in another vocabulary."""

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from jaxlm.data.tokenizers import ByteTokenizer, CharacterTokenizer, load_tokenizer
from jaxlm.data.vocabularies import same_tokens

TEXTS = ["the cat sat on the mat", "a dog and the cat", "she is here, café", "naïve 猫"] * 5


def trained(path, model, pre_tokenizer, trainer):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if isinstance(model, models.BPE):
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    else:
        tokenizer.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return load_tokenizer(path)


def test_kinds_of_tokenizers_share_their_words(tmp_path):
    """WordPiece's `cat` is byte-level BPE's ` cat`, not its `cat` inside a word; special tokens go by their role."""
    byte_level = trained(tmp_path / "bpe.json", models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True),
                         trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", "<mask>"],
                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    word_piece = trained(tmp_path / "wordpiece.json", models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(),
                         trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
                                                   show_progress=False))
    found = same_tokens(word_piece, byte_level)
    names = {token: name for name, token in byte_level.vocabulary.items()}
    by_name = {name: names.get(found[token]) for name, token in word_piece.vocabulary.items()}
    assert (by_name["the"], by_name["cat"]) == ("\u0120the", "\u0120cat") and by_name["[MASK]"] == "<mask>"
    assert by_name["[PAD]"] == "<pad>" and by_name["[UNK]"] is None
    assert by_name["##t"] == "t"
    back = same_tokens(byte_level, word_piece)
    assert all(back[found[token]] == token for token in range(word_piece.vocab_size) if found[token] >= 0)


def test_a_vocabulary_is_itself():
    for tokenizer in (ByteTokenizer({}), CharacterTokenizer.of("abc def\n", end_mark=True)):
        assert same_tokens(tokenizer, tokenizer).tolist() == list(range(tokenizer.vocab_size))
