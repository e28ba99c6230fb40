"""The tokens of an expression, and how a parser goes through them."""

from __future__ import annotations

import re

MAX_TOKENS = 1000

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)(?P<power>[eE][-+]?[0-9]{1,4})?(?![0-9.])|"
    r"(?P<command>\\[A-Za-z]+|\\[{}|])|(?P<letters>[A-Za-z]+)|(?P<sign>[-+*/^_!(){}\[\]|'%]))"
)
FUNCTIONS = {
    name: name
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp",
                 "cis")
} | {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "log": "log", "lg": "log10",
    "abs": "Abs", "cbrt": "cbrt", "asin": "asin", "acos": "acos", "atan": "atan",
    "gcd": "gcd", "lcm": "lcm",
    "min": "Min", "max": "Max",
}  # fmt: skip


class Unreadable(ValueError):
    """The text is no expression that this module knows."""


def is_word(letters: str) -> bool:
    """Whether a run of letters is a word and not a product of variables (`listen`; `xyz`)."""
    if len(letters) == 1 or letters in ("pi",):
        return False
    low = letters.lower()
    if not letters.isupper() and not re.search("[aeiouy]", low):
        return False  # `mgh`, `nRT`
    if len(low) == 2:
        return low in ("no", "on", "is", "it", "at", "or", "if", "as", "we", "up")
    used = sorted(set(low))
    return ord(used[-1]) - ord(used[0]) > len(low) or len(low) > 6


class Tokens:
    """Letters of a run are variables of their own, unless the run is a function or a word; without
    `words` none is a word."""

    def __init__(self, text: str, *, words: bool = True) -> None:
        import sympy

        self.words = words

        self.sympy = sympy
        self.tokens: list[tuple[str, str]] = []
        index, text = 0, text.rstrip()
        while index < len(text):
            found = _TOKEN.match(text, index)
            if found is None:
                raise Unreadable(text[index : index + 20])
            index = found.end()
            kind = found.lastgroup or ""
            if found["number"]:
                self.tokens.append(("number", found["number"] + (found["power"] or "")))
            elif kind == "letters":
                self._add_letters(found["letters"])
            else:
                self.tokens.append((kind, found[kind]))
        if len(self.tokens) > MAX_TOKENS:
            raise Unreadable(f"more than {MAX_TOKENS} tokens")
        self.at = 0
        self.powers = 0
        self.bits = 0.0
        self.bars = 0

    def _add_letters(self, letters: str) -> None:
        if letters in FUNCTIONS or letters == "pi":
            self.tokens.append(("command", "\\" + letters))
        elif self.words and is_word(letters):
            raise Unreadable(f"the word {letters}")
        else:
            self.tokens += [("letter", letter) for letter in letters]

    @property
    def text(self) -> str:
        """The token that is next; "" at the end."""
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    @property
    def kind(self) -> str:
        """Its kind: number, letter, command or sign."""
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, text: str) -> bool:
        """Go past the next token if it is `text`."""
        if self.text != text or not text:
            return False
        self.at += 1
        return True

    def need(self, text: str) -> None:
        """Go past the next token, which has to be `text`."""
        if not self.take(text):
            raise Unreadable(f"no {text}")

    def starts_factor(self) -> bool:
        """Whether the next token begins a factor, with no sign before it."""
        if self.kind in ("number", "letter"):
            return True
        if self.kind == "sign":
            return self.text in "([{" or (self.text == "|" and not self.bars)
        return self.kind == "command" and self.text not in (
            r"\cdot", r"\times", r"\div", r"\ast", r"\}", r"\rfloor", r"\rceil", r"\rangle", r"\|"
        )  # fmt: skip

    def is_function(self) -> bool:
        """Whether the next token is the name of a function."""
        return self.text[1:] in FUNCTIONS

    def raw(self) -> str:
        """The tokens of a group, or one, as text: an index, what is under a bar."""
        if not self.take("{"):
            self.at += 1
            return self.tokens[self.at - 1][1] if self.at <= len(self.tokens) else ""
        parts = []
        while not self.take("}"):
            if not self.text or self.text == "{":
                raise Unreadable("an index")
            parts.append(self.text)
            self.at += 1
        return "".join(parts)
