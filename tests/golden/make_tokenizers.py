"""Makes tests/golden/tokenizers: small folders as models have them, and what transformers makes of texts with each.

Needs the `torch` extra: `python tests/golden/make_tokenizers.py`. The vocabularies are trained on the texts below;
`ids.json` holds, for each folder, the ids of many texts, of one text and of a pair with special tokens, and the special
tokens themselves.
"""

import io
import json
import random
import shutil
import unicodedata
from pathlib import Path

import sentencepiece
import tokenizers
from transformers import AutoTokenizer
from transformers.utils import logging

FOLDER = Path(__file__).parent / "tokenizers"
CORPUS = ["The quick brown fox jumps over the lazy dog; the dog, being lazy, doesn't mind at all. It's 1984 again, isn't it?",
          "def add(a, b):\n    return a + b\n\n\nclass Tree:\n\tdef walk(self):\n\t\tyield from self.left.walk()\n",
          "Grüße aus Köln: naïve café, “quoted” words, Ελλάδα and Ωμέγα. 日本語と한국어 и русский текст.",
          "she sells sea shells by the sea shore, the shells she sells are sea shells for sure",
          "Reading maketh a full man; conference a ready man; and writing an exact man. Histories make men wise; poets witty; "
          "the mathematics subtle; natural philosophy deep; moral grave; logic and rhetoric able to contend.",
          "There is a tide in the affairs of men, which, taken at the flood, leads on to fortune; omitted, all the voyage of "
          "their life is bound in shallows and in miseries. On such a full sea are we now afloat.",
          "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was "
          "the epoch of belief, it was the epoch of incredulity, it was the season of light, it was the season of darkness.",
          "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse, and nothing "
          "particular to interest me on shore, I thought I would sail about a little and see the watery part of the world."] * 3
LETTERS = ("abcdefgh  ABC,.'!?-_01239\n\t\r\u00a0\u3000éüÉßñ日本한국русΩς\u0301\u0308\u200b\u200d\ufeff\u0000\u0007😀👍🏽ﬁª①"
           "▁ĠÄ\u2028\ud7ff\ue000\U00020000")
SPELLED = ["<s>a</s>", "[CLS] x [SEP]", "a<mask>b", "<|endoftext|>", "[MASK][UNK]", "<unk> <pad>", "<0x41>"]


def strings(count: int = 160) -> list[str]:
    """Texts that a tokenizer may meet: words, blanks, lines, scripts, marks, control characters, emoji, nothing."""
    draw = random.Random(15)
    words = " ".join(CORPUS).split()
    found = ["", " ", "  ", "\n", " a", "a ", "▁", "▁a", " ▁a", "a\n\nb", "don't  stop", "  two", "\ttab", *SPELLED, *CORPUS[:4]]
    while len(found) < count:
        if draw.random() < 0.4:
            found.append(draw.choice([" ", "  ", "\n", ", "]).join(draw.choices(words, k=draw.randint(1, 8))))
        else:
            found.append("".join(draw.choices(LETTERS, k=draw.randint(1, 14))))
    return found


def write(name: str, **files: str | bytes | dict | list) -> None:
    """A folder with these files; `__` in a name stands for its dot."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, content in files.items():
        path = folder / file.replace("__", ".")
        if isinstance(content, dict | list):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


# ------------------------------------------------------------------------------------------------------------ trained

def wordpiece(lowercase: bool) -> str:
    """vocab.txt, with the special tokens where BERT has them: not at the beginning."""
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    tokenizer.train_from_iterator(CORPUS, vocab_size=240, min_frequency=1, show_progress=False, special_tokens=[])
    learned = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return "\n".join(["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *learned]) + "\n"


def byte_level(special: list[str]) -> tuple[dict, str]:
    """vocab.json and merges.txt."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS, vocab_size=360, min_frequency=2, show_progress=False, special_tokens=special)
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
    return model["vocab"], f"#version: 0.2\n{merges}\n"


def sentencepiece_model(kind: str, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(" ".join(CORPUS).splitlines()), model_writer=model,
                                             model_type=kind, minloglevel=3, num_threads=1, hard_vocab_limit=False, **options)
    return model.getvalue()


def rules() -> str:
    """A small part of NFKC as SentencePiece rules: compositions, ligatures, wide letters, blanks."""
    pairs = {**{chr(code): unicodedata.normalize("NFKC", chr(code)) for code in (*range(0xA0, 0x100), 0xFB01, 0x3000, 0x2460)},
             "\t": " ", "\n": " ", "\r": " ", "\u200b": " ", "\u0007": "", "e\u0301": "é", "u\u0308": "ü"}
    return "".join(f"{' '.join(f'{ord(c):X}' for c in source)}\t{' '.join(f'{ord(c):X}' for c in target)}\n"
                   for source, target in pairs.items() if source != target)


def make_folders() -> None:
    vocabulary = wordpiece(True)
    write("bert", vocab__txt=vocabulary, config__json={"model_type": "bert"})
    write("bert_cased", vocab__txt=wordpiece(False), config__json={"model_type": "bert"},
          tokenizer_config__json={"do_lower_case": False, "tokenizer_class": "BertTokenizer", "model_max_length": 64})
    write("bert_options", vocab__txt=vocabulary, config__json={"model_type": "distilbert"},
          tokenizer_config__json={"strip_accents": False, "tokenize_chinese_chars": False, "do_lower_case": True,
                                  "tokenizer_class": "DistilBertTokenizer"},
          added_tokens__json={"covid-19": len(vocabulary.splitlines())})
    vocabulary, merges = byte_level(["<|endoftext|>"])
    write("gpt2", vocab__json=vocabulary, merges__txt=merges, config__json={"model_type": "gpt2"})
    write("gpt2_prefix", vocab__json=vocabulary, merges__txt=merges, config__json={"model_type": "gpt2"},
          tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True},
          special_tokens_map__json={"pad_token": "<|pad|>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
          added_tokens__json={"<|pad|>": len(vocabulary)})
    write("qwen2", vocab__json={token: number for token, number in vocabulary.items() if token != "<|endoftext|>"} | {"x0": 0},
          merges__txt=merges, config__json={"model_type": "qwen3", "vocab_size": 512},
          tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                                  "bos_token": None, "add_prefix_space": False, "added_tokens_decoder": {
                                      str(len(vocabulary) + number): {"content": token, "lstrip": False, "normalized": False,
                                                                      "rstrip": False, "single_word": False, "special": special}
                                      for number, (token, special) in enumerate([
                                          ("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True),
                                          ("<tool_call>", False)])}})
    vocabulary, merges = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    write("roberta", vocab__json=vocabulary, merges__txt=merges, config__json={"model_type": "roberta"})
    write("roberta_prefix", vocab__json=vocabulary, merges__txt=merges, config__json={"model_type": "roberta"},
          tokenizer_config__json={"add_prefix_space": True, "trim_offsets": True, "tokenizer_class": "RobertaTokenizer"})
    llama = sentencepiece_model("bpe", vocab_size=600, byte_fallback=True, normalization_rule_name="identity",
                                remove_extra_whitespaces=False, split_digits=True)
    write("llama", tokenizer__model=llama, config__json={"model_type": "llama"},
          tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                                  "legacy": False, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
    size = sentencepiece.SentencePieceProcessor(model_proto=llama).vocab_size()
    write("llama_legacy", tokenizer__model=llama, config__json={"model_type": "llama"},
          tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True,
                                  "legacy": True, "bos_token": {"__type": "AddedToken", "content": "<s>"}},
          added_tokens__json={"<tool>": size, "[PAD]": size + 1}, special_tokens_map__json={"pad_token": "[PAD]"})
    write("llama_bare", tokenizer__model=llama, config__json={"model_type": "llama"})
    write("mistral", tokenizer__model=llama, config__json={"model_type": "mistral"},
          tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False})
    path = FOLDER / "rules.tsv"
    path.write_text(rules())
    common = {"normalization_rule_tsv": str(path)}
    unigram = sentencepiece_model("unigram", vocab_size=200, **common)
    write("xlm_roberta", **{"sentencepiece__bpe__model": unigram}, config__json={"model_type": "xlm-roberta"})
    camembert = sentencepiece_model("unigram", vocab_size=200, **common)
    write("camembert", **{"sentencepiece__bpe__model": camembert}, config__json={"model_type": "camembert"})
    albert = sentencepiece_model("unigram", vocab_size=200, **common, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
                                 control_symbols=["[CLS]", "[SEP]", "[MASK]"])
    write("albert", spiece__model=albert, config__json={"model_type": "albert"})
    t5 = sentencepiece_model("unigram", vocab_size=200, **common, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    write("t5", spiece__model=t5, config__json={"model_type": "t5"}, tokenizer_config__json={"extra_ids": 10})
    path.unlink()
    AutoTokenizer.from_pretrained(FOLDER / "bert").save_pretrained(FOLDER / "bert_saved")  # as version 5 writes it
    (FOLDER / "bert_saved" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    make_modernbert()


def make_modernbert() -> None:
    """tokenizer.json with byte-level BPE and BERT's special tokens behind it, and the files of version 4 beside it."""
    vocabulary, merges = byte_level(["<|padding|>", "<|endoftext|>"])
    pairs = [tuple(line.split(" ")) for line in merges.splitlines()[1:]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    tokenizer.normalizer, tokenizer.pre_tokenizer = tokenizers.normalizers.NFC(), tokenizers.pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|padding|>", "<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]",
                                  tokenizers.AddedToken("[MASK]", lstrip=True, special=True)])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ids)
    special = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}
    write("modernbert", tokenizer__json=tokenizer.to_str(), config__json={"model_type": "modernbert"},
          special_tokens_map__json={**special, "mask_token": {"content": "[MASK]", "lstrip": True}},
          tokenizer_config__json={**special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192,
                                  "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"]})


def golden(folder: Path, texts: list[str]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    pair = tokenizer("the dog", "a fox", return_token_type_ids=True)
    roles = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")
    return {"class": type(tokenizer).__name__, "ids": plain, "single": tokenizer("the dog")["input_ids"],
            "pair": pair["input_ids"], "types": pair["token_type_ids"], "size": len(tokenizer),
            "special": {role: getattr(tokenizer, f"{role}_token_id") for role in roles}}


def main() -> None:
    logging.set_verbosity_error()
    make_folders()
    texts = strings()
    found = {folder.name: golden(folder, texts) for folder in sorted(FOLDER.iterdir()) if folder.is_dir()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {"texts": texts, **found}.items())
    (FOLDER / "ids.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
