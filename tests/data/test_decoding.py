"""Encodings: text in another one is never lost without a word, and is read in full once it is named (line 7)."""

import codecs
import gzip
import json

import pytest

from jaxlm import config
from jaxlm.data.decoding import FEW, MOST_REPLACED, Decoding
from jaxlm.data.description import describe
from jaxlm.data.documents import read_documents
from jaxlm.data.formats import Reading, look_at
from jaxlm.data.prepare import prepare
from jaxlm.data.sources import find_sources, plan_units
from jaxlm.errors import UserError
from jaxlm.settings import DataSettings

CHINESE = "中国的经济在过去的几十年里取得了巨大的发展，人民的生活水平不断提高。今天天气很好。\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
KOREAN = "모든 국민은 인간으로서의 존엄과 가치를 가지며, 행복을 추구할 권리를 가진다.\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
GERMAN = "Die Straße führt über die Brücke und später an größeren Häusern vorbei.\n"
ENGLISH = "“It’s a café,” she said — and smiled.\n"
FOREIGN = {  # encoding: a text in it, and what a user may be told to set
    "gb18030": (CHINESE, "gb18030"), "gbk": (CHINESE, "gb18030"), "big5": ("中國的經濟在過去取得了巨大的發展。\n", "big5"),
    "shift_jis": (JAPANESE, "cp932"), "euc_jp": (JAPANESE, "euc-jp"), "euc_kr": (KOREAN, "cp949"), "koi8_r": (RUSSIAN, "koi8-r"),
    "cp1251": (RUSSIAN, "cp1251"), "latin_1": (GERMAN, "cp1252"), "cp1252": (ENGLISH, "cp1252"),
    "utf_16_le": (CHINESE, "utf-16-le"), "utf_16_be": (ENGLISH, "utf-16-be"), "utf_32_le": (GERMAN, "utf-32-le"),
}


def documents(path, unit_bytes=2**30, **reading):
    reading = Reading(**reading)
    units = plan_units(look_at(find_sources(str(path)), reading), reading.document, unit_bytes)
    return [document for unit in units for document in read_documents(unit, reading)]


@pytest.mark.parametrize("encoding", FOREIGN)
def test_another_encoding_is_refused_and_named_and_read_once_it_is_set(tmp_path, encoding):
    text, likely = FOREIGN[encoding]
    path = tmp_path / "a.txt"
    path.write_bytes((text * 30).encode(encoding))
    with pytest.raises(UserError) as error:
        documents(path)
    assert str(error.value).startswith(f"{path}: ") and f"set data.encoding={likely}" in str(error.value)
    assert "\n" not in str(error.value) and "\ufffd" not in str(error.value)
    assert documents(path, encoding=likely) == [(text * 30, 0, 0)]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "shift_jis", "utf-16", "utf-16-be", "utf-32", "iso2022_jp"])
@pytest.mark.parametrize("unit_bytes", [1, 30, 2**30])
def test_lines_and_records_of_any_encoding_are_the_same_however_they_are_cut(tmp_path, encoding, unit_bytes):
    lines = ["", "吾輩は猫である", "名前\u3000はまだ無い", "plain", *(f"猫 {number}" for number in range(20))]
    records = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    files = {"a.txt": "\n".join(lines) + "\n", "a.jsonl": "\n".join(records) + "\n",
             "a.csv": "text,b\n" + "".join(f"{line},1\n" for line in lines)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode(encoding)))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            found = documents(path, unit_bytes, encoding=encoding, document="line")
            assert [document.text for document in found] == lines, path


def test_byte_order_marks_say_the_encoding_whatever_the_key_says(tmp_path):
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
                           (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")):
        (tmp_path / "a.txt").write_bytes(mark + CHINESE.encode(encoding))
        for wanted in ("utf-8", "gb18030", "cp1252"):
            assert documents(tmp_path / "a.txt", encoding=wanted) == [(CHINESE, 0, 0)]
            assert documents(tmp_path / "a.txt", encoding=wanted, document="line") == [(CHINESE.strip(), 0, 0)]


def test_utf8_among_files_of_the_named_encoding_is_read_as_what_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(CHINESE.encode("gb18030"))
    (tmp_path / "b.txt").write_bytes(CHINESE.encode())
    assert [document.text for document in documents(tmp_path, encoding="gb18030")] == [CHINESE] * 2


def test_a_long_text_of_two_byte_characters_is_measured_in_utf8(tmp_path):
    """A page of UTF-16 has twice the bytes that it has in UTF-8, where data.cleaning.max_bytes counts."""
    (tmp_path / "a.txt").write_bytes(("x" * 1000).encode("utf-16"))
    assert documents(tmp_path / "a.txt", max_bytes=1000) == [("x" * 1000, 0, 0)]
    assert documents(tmp_path / "a.txt", max_bytes=999) == [(None, 0, 1000)]


def test_replaced_characters_are_counted_and_not_those_that_were_there():
    for encoding, content, expected in (("utf-8", b"a\xffb\xfe", ("a\ufffdb\ufffd", 2)),
                                        ("utf-8", "\ufffd".encode(), ("\ufffd", 0)),
                                        ("utf-8", "\ufffd".encode() + b"\xff", ("\ufffd\ufffd", 1)),
                                        ("ascii", "é".encode(), ("\ufffd\ufffd", 2)), ("cp1252", b"\x81", ("\ufffd", 1))):
        decoding = Decoding(encoding)
        assert decoding.decode(content) == expected
        assert (decoding.characters, decoding.replaced) == (len(expected[0]), expected[1])
        pieces = Decoding(encoding)
        decode = pieces.in_pieces()
        text = "".join(decode(content[place:place + 1], False) for place in range(len(content))) + decode(b"", True)
        assert (text, pieces.replaced, pieces.characters) == (expected[0], expected[1], len(expected[0]))


def prepared(folder, **keys):
    return prepare(DataSettings(raw=str(folder), tokenizer="bytes", validation=0, **keys), folder.parent / "corpus")


def test_damage_below_the_share_is_counted_and_said(tmp_path):
    (tmp_path / "in").mkdir()
    size = 20_000
    (tmp_path / "in" / "a.txt").write_bytes(b"word " * size + b"\xff\xfe")
    (tmp_path / "in" / "b.txt").write_bytes(b"word " * size + b"\xff")
    corpus = prepared(tmp_path / "in")
    report = json.loads((tmp_path / "corpus" / "report.json").read_text())
    assert (report["replaced_characters"], report["repaired"]) == (3, 2)
    assert any("3 characters in 2 files, 2 of them in" in note and "a.txt" in note for note in corpus.notes)
    assert "replaced    3 characters that could not be decoded" in describe(corpus)


def test_the_share_is_of_a_file_and_of_all(tmp_path):
    """One file with more than 0.1 % is refused however large the others; many small ones are, too, where it is so of
    all."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "large.txt").write_bytes(b"word " * 2**18)
    rare = b"plain words and nothing else, 50 characters a line\n" * 1900 + b"caf\xe9 " * (FEW + 90)
    (tmp_path / "in" / "late.txt").write_bytes(rare)
    assert (FEW + 90) / len(rare) > MOST_REPLACED and b"\xe9" not in rare[:2**16]
    with pytest.raises(UserError, match=r"late\.txt: 100 of its 97,\d+ characters are not utf-8 and would be lost; .*cp1252"):
        prepared(tmp_path / "in")
    (tmp_path / "in" / "late.txt").unlink()
    (tmp_path / "in" / "large.txt").unlink()
    for number in range(20):
        (tmp_path / "in" / f"{number}.txt").write_text("ein kurzer Text, ä\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"\d+\.txt: 1 of its 19 characters are not utf-8 .* data\.encoding=cp1252"):
        prepared(tmp_path / "in")
    assert not (tmp_path / "corpus").exists() and not list(tmp_path.glob("*.partial"))
    assert prepared(tmp_path / "in", encoding="latin-1").train.num_bytes == 20 * len("ein kurzer Text, ä\n".encode())


def test_noise_is_no_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(number * 7 % 255 + 1 for number in range(4000)))
    with pytest.raises(UserError, match=r"a\.txt: [\d,]+ of its [\d,]+ characters are not utf-8 and would be lost"):
        documents(tmp_path / "a.txt")


@pytest.mark.parametrize("name, hint", [("latn-1", "latin-1"), ("gb18031", "gb18030"), ("base64", None),
                                        ("shift-jiss", "shift-jis"), ("undefined", None), ("", None)])
def test_an_encoding_that_is_none_is_refused_with_the_nearest(tmp_path, name, hint):
    (tmp_path / "run.yaml").write_text("run_dir: run\n")
    with pytest.raises(UserError, match=f"^data\\.encoding={name}: no text encoding") as error:
        config.load(tmp_path / "run.yaml", [f"data.encoding={name}"])
    assert hint is None or f"did you mean '{hint}'?" in str(error.value)


def test_spellings_of_an_encoding_are_the_same_corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text of a file")
    digest = prepared(tmp_path / "in", encoding="UTF8").digest
    assert prepared(tmp_path / "in").digest == digest
    with pytest.raises(UserError, match=r'^data\.encoding: "iso8859-1", but .* was prepared with "utf-8"'):
        prepared(tmp_path / "in", encoding="latin1")
