"""From bytes to characters: the encoding of a file, what in it is none of its characters, and which encoding it
looks like.

What is invalid becomes U+FFFD and is counted. A text in another encoding would be lost that way, so a file with more
than MOST_REPLACED of it is refused, and the likely encoding named.
"""

import codecs
import io
from collections.abc import Callable, Iterator
from encodings.aliases import aliases
from typing import IO

from jaxlm.data.source_file import CHUNK
from jaxlm.errors import UserError, nearest

MOST_REPLACED = 0.001  # of a file's characters, and of all: what is damaged is rarer than that, another encoding is not
FEW = 10  # characters: in one file that is no sign of anything
REPLACEMENT = "\ufffd"
SAMPLE = 2**16  # bytes to tell the encoding by
CERTAIN = 16  # characters beyond ASCII in valid UTF-8: no other encoding looks like that by chance
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
                    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}  # UTF-32's begins like UTF-16's
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
WITH_STATE = ("iso2022", "hz", "utf-7")  # what a byte means depends on those before: a file cannot be cut at its lines
# Those that texts come in, the usual one first, with the names that people know them by
USUAL = {"gb18030": "Chinese: GB18030, GBK, GB2312", "big5": "Chinese: Big5", "cp932": "Japanese: Shift-JIS",
         "euc_jp": "Japanese: EUC-JP", "cp949": "Korean: EUC-KR", "cp1252": "Western: Latin-1, Windows-1252",
         "cp1250": "Central European: Windows-1250", "iso8859_2": "Central European: Latin-2", "cp1251": "Cyrillic: Windows-1251",
         "koi8_r": "Cyrillic: KOI8-R", "cp1253": "Greek: Windows-1253", "cp1254": "Turkish: Windows-1254, Latin-5",
         "cp1255": "Hebrew: Windows-1255", "cp1256": "Arabic: Windows-1256", "cp1257": "Baltic: Windows-1257",
         "cp874": "Thai: Windows-874, TIS-620", "utf_16_le": "UTF-16 without a mark", "utf_16_be": "UTF-16 without a mark",
         "mac_roman": "Western: Mac"}
SEVERAL_BYTES = ("gb18030", "big5", "cp932", "euc_jp", "cp949", "utf_16_le", "utf_16_be")
LATIN = 0.4  # of the bytes: with fewer than that beyond ASCII it is a Latin alphabet, most likely


def encoding_problems(name: str) -> Iterator[str]:
    """A line unless Python knows a text encoding of this name (data.encoding)."""
    if not is_text_encoding(name):
        known = sorted({each.replace("_", "-") for each in (*aliases, *aliases.values(), "latin-1") if is_text_encoding(each)})
        yield (f"data.encoding={name}: no text encoding that Python knows, such as utf-8, latin-1, cp1252, gb18030 or shift-jis"
               f"{nearest(name.replace('_', '-'), known)}")


def is_text_encoding(name: str) -> bool:
    try:
        return "a".encode(name).decode(name) == "a"  # refuses base64, too, which is between bytes
    except (LookupError, UnicodeError, ValueError):
        return False


def encoding_of(head: bytes, wanted: str) -> str:
    """The encoding of a file that begins so: what its byte order mark says, UTF-8 where it certainly is, or the
    wanted one."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    wanted = codecs.lookup(wanted).name
    if wanted in ("utf-16", "utf-32"):
        return wide_encoding(head, [name for name in WIDE if name.startswith(wanted)]) or f"{wanted}-le"
    return "utf-8" if not wanted.startswith("utf") and is_certainly_utf8(head) else wanted


def is_certainly_utf8(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return sum(character > "\x7f" for character in text) >= CERTAIN


def wide_encoding(head: bytes, encodings: tuple[str, ...] | list[str] = WIDE) -> str | None:
    """UTF-16 or UTF-32 without a byte order mark: as what it is text, with blanks and lines and without zeros."""
    for encoding in encodings:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        blanks = text.count(" ") + text.count("\n") + text.count("\u3002")
        strange = sum(not character.isprintable() and character not in "\n\r\t\f\ufeff\u3000" for character in text)
        if blanks * 400 >= len(text) > 0 and strange * 100 <= len(text):
            return encoding
    return None


def has_plain_lines(encoding: str) -> bool:
    """Whether the byte 10 is a line's end, and nothing else: such a file can be cut between its lines."""
    return not encoding.startswith(WITH_STATE) and "a\n".encode(encoding) == b"a\n"


def byte_order_mark(encoding: str) -> bytes:
    """That of UTF-8 and GB18030; b'' where there is none."""
    return "\ufeff".encode(encoding, "ignore") if has_plain_lines(encoding) else b""


class Decoding:
    """Decodes what is read of one file, and counts: `characters`, and how many of them were `replaced` by U+FFFD."""

    def __init__(self, encoding: str):
        self.encoding = encoding
        self.characters = self.replaced = 0
        self.sample = b""  # from where the first was replaced

    def decode(self, content: bytes) -> tuple[str, int]:
        """The text, and how many of its characters had to be replaced."""
        try:
            text, replaced = content.decode(self.encoding), 0
        except UnicodeDecodeError as error:
            text = content.decode(self.encoding, "replace")
            replaced = text.count(REPLACEMENT) - content.decode(self.encoding, "ignore").count(REPLACEMENT)
            self.take_sample(content, error.start)
        self.characters += len(text)
        self.replaced += replaced
        return text, replaced

    def in_pieces(self) -> Callable[[bytes, bool], str]:
        """`decode(piece, last)` for a text that comes in pieces, of which b'' may be the last."""
        make = codecs.getincrementaldecoder(self.encoding)
        replacing, dropping = make("replace"), make("ignore")

        def decode(piece: bytes, last: bool) -> str:
            text = replacing.decode(piece, last)
            replaced = text.count(REPLACEMENT) - dropping.decode(piece, last).count(REPLACEMENT)
            if replaced:
                self.take_sample(piece, 0)
            self.characters += len(text)
            self.replaced += replaced
            return text

        return decode

    def take_sample(self, content: bytes, place: int) -> None:
        begin = content.rfind(b"\n", 0, place) + 1
        begin = begin if place - begin < SAMPLE // 2 else place
        self.sample = self.sample or content[begin:begin + SAMPLE]


class Utf8Stream(io.RawIOBase):
    """Another encoding's bytes as those of UTF-8, without byte order mark: for what cannot be cut at the byte 10."""

    def __init__(self, stream: IO[bytes], decoding: Decoding):
        super().__init__()
        self.stream, self.decode = stream, decoding.in_pieces()
        self.ready, self.ended, self.begun = b"", False, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.ready and not self.ended:
            piece = self.stream.read(CHUNK)
            self.ended = not piece
            text = self.decode(piece, self.ended)
            self.ready = (text if self.begun else text.removeprefix("\ufeff")).encode(errors="replace")
            self.begun = self.begun or bool(text)
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


# ----------------------------------------------------------------------------------------------------- another encoding

def refuse_foreign(name: str, encoding: str, replaced: int, characters: int, sample: bytes) -> None:
    """Raises UserError, naming the file and its likely encoding, where more than MOST_REPLACED of the characters are
    replaced."""
    if replaced > FEW and replaced > MOST_REPLACED * characters:
        raise foreign(name, encoding, replaced, characters, likely_encodings(sample))


def foreign(name: str, encoding: str, replaced: int, characters: int, likely: list[str]) -> UserError:
    what = f"{name}: {replaced:,} of its {characters:,} characters are not {encoding} and would be lost"
    if not likely:
        return UserError(f"{what}; name its encoding with data.encoding, or drop them, for example by `iconv -c -f {encoding} "
                         f"-t {encoding}`")
    others = f" (or {', '.join(likely[1:3])})" if likely[1:] else ""
    return UserError(f"{what}; it looks like {described(likely[0])}: set data.encoding={likely[0]}{others}")


def described(encoding: str) -> str:
    name = USUAL.get(encoding.replace("-", "_"))
    return f"{encoding} ({name})" if name else encoding


def likely_encodings(sample: bytes) -> list[str]:
    """The encodings that a text of these bytes is probably in, the best first; [] when none fits."""
    import charset_normalizer

    for cut in range(4):  # a character may be cut at the end
        found = list(charset_normalizer.from_bytes(sample[:len(sample) - cut], cp_isolation=list(USUAL)))
        if found:
            break
    if not found:
        return []
    least = min(match.chaos for match in found)
    good = [match for match in found if match.chaos <= least + 0.03]
    most = max(match.coherence for match in good)
    # several decode it to the same, or as well: the more usual one then
    names = {name for match in good if match.coherence >= most - 0.07 for name in (match.encoding, *match.could_be_from_charset)}
    beyond_ascii = sum(byte > 127 for byte in sample) / max(1, len(sample))
    if beyond_ascii < LATIN and names.isdisjoint(SEVERAL_BYTES):
        names.add("cp1252")
    japanese = {name for name in ("cp932", "euc_jp") if has_kana(sample, name)}
    return [name.replace("_", "-") for name in USUAL if name in (japanese or names)]


def has_kana(sample: bytes, encoding: str) -> bool:
    """Whether a tenth of the characters is hiragana, as in any Japanese text, and in what others decode to never is."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    return sum("\u3041" <= character <= "\u309f" for character in text) * 10 >= len(text)
