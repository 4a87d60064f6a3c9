"""Texts and id sequences on which tokenizers are compared; the same ones every time.

Fixed lines name what has gone wrong before in tokenizers (blanks, digits, line ends, marks of
bytes); code points are gone through in order, alone and in their decomposed forms; the rest is
drawn from a vocabulary, from many scripts and from source code.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

_LINES = (
    *(
        "",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " \n ",
        "\u00a0",
        "\u3000",
        "▁",
        " ▁",
        "▁▁ a",
        "Ġ",
    ),
    *("a", " a", "  a", "a ", "a  ", " a b  c   d    e ", "\na\n b\n  c\n", "a\r\nb\rc\n\n\n"),
    *("0123456789", "3 8 38 83 338 1234567890", "3.14159, 1,000,000.00; 0x1F, 1e-9, 12:34, 50 %"),
    "don't I'll we've it's they'd I'm you're DON'T IT'S ''s 'tis",
    "def f(x, *, y=0):\n    return x**2 if y else [x, {'k': None}]  # note\n",
    'for (int i = 0; i < n; ++i) { a[i] |= b->c << 2; }\t// "s" \\n',
    "<a href='http://example.org/?q=1&r=2#x'>link</a> <!-- -->&amp;",
    "SELECT * FROM t WHERE a<>'b' AND c!=1; x <- y %>% z $HOME ~/.bashrc",
    "naïve façade Größe Ångström Œuvre İstanbul ĳ ŉ ǆ ß ẞ",
    "e\u0301 n\u0303 a\u030a A\u0302\u0301 q\u0323\u0307 \u1e9b\u0323 \u212b \u2126 \uf900",
    "\ufb01 \u2460 \u00bd \uff21 \u3392 \u2122 \u00b2 \u2167 \u33c2 \uff76\uff9e",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u061c\u202e\u2066 \ufe0f\u20e3 \U000e0061",
    "日本語のテキスト、漢字とかな。ｶﾞ ガ パ",
    "한국어 문장입니다. 각",
    "中文文本，没有空格。繁體字",
    "Русский текст, кириллица. й ё",
    "Ελληνικά ΐ Ὀδυσσεύς",
    "עברית שָׁלוֹם وعربي السَّلَامُ ۱۲۳",
    "हिन्दी क्षत्रिय ত্রিপুরা தமிழ் ไทย ກີ ខ្មែរ မြန်မာ",
    "🦙🔥👩\u200d🔬👨\u200d👩\u200d👧\u200d👦 🇩🇪🇫🇷 1\ufe0f\u20e3 👍🏽",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f\x80\x85\x9f",
    "\ue000 \U000f0000 \U0010fffd \U0001fbff \ufffd \ufffe \uffff",
    "<0x0A> <0xFF> <0x41> <unk> <s> </s> <pad> <mask> [CLS] [SEP] <|x|> <|reserved_1|>",
    "[INST] USER: ASSISTANT: <<SYS>> [/INST] ### Human:",
)
_RUNS = " \n\t-=_.*#0a8▁日\u00a0"
_LENGTHS = (2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 80, 129, 300)
_BLANKS = (" ", " ", " ", "", "", "", "  ", "\n", "\n\n", "\t", "   ", "\r\n", "\u00a0", " \n")
_SCRIPTS = (
    *((0x20, 0x7F), (0x20, 0x7F), (0x30, 0x3A), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530)),
    *((0x530, 0x700), (0x900, 0xE00), (0xE00, 0x1200), (0x1E00, 0x2070), (0x2070, 0x2400)),
    *((0x2400, 0x2C00), (0x3000, 0x3400), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xF900, 0x10000)),
    *((0x1F000, 0x1FB00), (0x0, 0x20), (0x20000, 0x20100)),
)
_WORDS = (
    *("The", "picture", "shows", "a", "small", "boat", "on", "the", ".", ",", "!", "?", ":", "("),
    *("HOW", "camelCase", "snake_case", "=", "{", "}", "[", "==", "!=", "->", "::", "//", "/*"),
    *("7", "42", "1999", "3.5", "$5", "10%", "#tag", "@user", "e.g.", "U.S.", "it's", "-1"),
    *("Ein", "Bild", "mehr", "où", "él", "niño", "привет", "мир", "東京", "서울", "שלום", "مرحبا"),
)
_LINE = 48
_LAST_BLOCK = 0x32400
_SYLLABLES = frozenset(map(chr, range(0xAC00, 0xD7A4)))
"""Of Hangul, which are decomposed by rule."""
_TAGS = range(0xE0000, 0xE01F0)


def drawn_texts(words: Sequence[str], marks: Sequence[str], count: int) -> list[str]:
    """The fixed lines, runs of one character, and ``count`` drawn texts.

    Args:
        words: texts of a vocabulary, so that rare pieces are met.
        marks: contents of added tokens, put among the others with and without blanks.
        count: how many are drawn.
    """
    chance = random.Random(7)
    runs = [character * length for character in _RUNS for length in _LENGTHS]
    around = [f"{a}{mark}{b}" for mark in marks[:64] for a, b in _SURROUNDS]
    return [*_LINES, *runs, *around, *(_drawn(chance, words, marks) for _ in range(count))]


def code_points(share: int = 1) -> list[str]:
    """Lines of every assigned code point, or of one line in ``share``, surrogates left out."""
    return _code_points()[::share]


def composed(texts: Sequence[str]) -> list[str]:
    """Texts of composed characters, with a blank before each that would join another.

    A table of characters is followed by the longest match in sentencepiece and by grapheme in the
    tokenizers library, so sequences of combining characters differ there. What each character by
    itself becomes does not.
    """
    return [
        "".join(
            f" {c}" if unicodedata.category(c).startswith("M") else c
            for c in unicodedata.normalize("NFKC", text)
        )
        for text in texts
    ]


def decompositions(share: int = 1) -> list[str]:
    """Lines of the decomposed forms of every character that has one: composing shows at each."""
    return _decompositions()[::share]


def drawn_sequences(
    ids: Sequence[int], special: Sequence[int], count: int, longest: int = 48
) -> list[list[int]]:
    """Random id sequences.

    Args:
        ids: of the vocabulary.
        special: ids to be met often: of single bytes, of user-defined symbols.
        count: how many.
        longest: ids of one.
    """
    chance = random.Random(11)
    found = []
    for _ in range(count):
        share = chance.choice((0.0, 0.1, 0.5, 0.9)) if special else 0.0
        found.append(
            [
                chance.choice(special if chance.random() < share else ids)
                for _ in range(chance.randint(1, longest))
            ]
        )
    return found


_SURROUNDS = (("", ""), ("a", "b"), ("a ", " b"), (" ", "  b"), ("\n", "\n"), ("7", "8"))


def _drawn(chance: random.Random, words: Sequence[str], marks: Sequence[str]) -> str:
    parts: list[str] = []
    for _ in range(chance.randint(1, 9)):
        kind = chance.random()
        if kind < 0.45 and words:
            parts.append(chance.choice(words))
        elif kind < 0.65:
            parts.append(chance.choice(_WORDS))
        elif kind < 0.75:
            parts.append(str(chance.randrange(10 ** chance.randint(1, 12))))
        elif kind < 0.78 and marks:
            parts.append(chance.choice(marks))
        elif kind < 0.82:
            parts.append(chance.choice(_RUNS) * chance.randint(2, 40))
        else:
            low, high = chance.choice(_SCRIPTS)
            parts += [chr(chance.randrange(low, high)) for _ in range(chance.randint(1, 10))]
        parts.append(chance.choice(_BLANKS))
    return "".join(parts)


@cache
def _code_points() -> list[str]:
    kept = [
        character
        for character in map(chr, [*range(_LAST_BLOCK), *_TAGS])
        if unicodedata.category(character) not in ("Cn", "Cs", "Co")
    ]
    return ["".join(kept[i : i + _LINE]) for i in range(0, len(kept), _LINE)]


@cache
def _decompositions() -> list[str]:
    return [*_in_lines(_decomposed())]


def _decomposed() -> Iterator[str]:
    for character in map(chr, range(_LAST_BLOCK)):
        if unicodedata.decomposition(character) or character in _SYLLABLES:
            canonical = unicodedata.normalize("NFD", character)
            yield (
                unicodedata.normalize("NFKD", character) if canonical == character else canonical
            )


def _in_lines(texts: Iterator[str]) -> Iterator[str]:
    line = ""
    for text in texts:
        line += f"{text} "
        if len(line) > _LINE:
            yield line
            line = ""
    yield line
