r"""One spelling for what people write in several: commands, spaces, fonts, Unicode.

`plain` changes how an answer is written, never what it says. Fonts and `\text` go, their content
stays with a space on each side (so `12\text{m}` has a unit and `12m` a variable).
"""

from __future__ import annotations

import re
import unicodedata

_UNICODE = {
    **dict.fromkeys("−–‐‑‒—﹣－", "-"),
    **dict.fromkeys("\u2009\u200a\u202f\u00a0\u2007\u2008\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "√": r"\sqrt ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "≈": r"\approx ",
    "∅": r"\emptyset ",
    "⇒": r"\implies ",
    "→": r"\to ",
    "⟹": r"\implies ",
    "⇔": r"\iff ",
    "⟺": r"\iff ",
    "↔": r"\iff ",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "′": "'",
    "，": ",",
    "％": "%",
    "€": r"\euro ",
    "£": r"\pound ",
    "¥": r"\yen ",
    "¢": r"\cent ",
    "ℝ": r"\reals ",
    "₹": r"\rupee ",
    "₩": r"\won ",
    "₽": r"\ruble ",
    "…": r"\ldots ",
    "⋯": r"\ldots ",
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "∖": r"\setminus ",
    "≡": r"\equiv ",
    "∧": r"\land ",
    "∨": r"\lor ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "⟨": "(",
    "⟩": ")",
    "∣": "|",
    "∗": "*",
    "∶": ":",
    "٫": ".",
    "٬": ",",
    "、": ",",
    "。": ".",
}
_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER (\w+)")
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUPERS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_SMALL_FRACTION = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[⁄/∕]([₀₁₂₃₄₅₆₇₈₉]+)")
_BARRED = re.compile("(?:[0-9][\u0304\u0305])+")
"""Digits with a combining macron or overline each: those that repeat."""

_BRACE = re.compile(
    r"(?P<font>\\(?:text(?:rm|bf|it|normal|tt|sf|sc)?|math(?:rm|bf|it|sf|tt|normal|bb|cal)|mbox|"
    r"hbox|operatorname\*?|bold(?:symbol)?|emph|underline|boxed|fbox|bm|mathop|ensuremath|substack)"
    r"(?![A-Za-z])\s*\{)|\\.|[{}]",
    re.DOTALL,
)
_REALS = re.compile(r"\\mathbb\s*(?:\{\s*R\s*\}|R)(?![A-Za-z])")
_COLOR = re.compile(r"\\(?:text)?color\s*(?:\[[^][]*\]\s*)?\{[^{}]*\}")
_RULES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|[bB]ig[gG]?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|tiny|small|normalsize|large|Large|"
         r"LARGE|huge|Huge)(?![A-Za-z])", " "),
        (r"\\(?:label|tag\*?|[hv]?phantom)\s*\{[^{}]*\}", " "),
        (r"\\(?:begin|end)\{(?:align|aligned|equation|gather|gathered|split|center)\*?\}", " "),
        (r"(?<=\d)\s*(?:\{,\}|,?\s*\\!|\{?\\[,;: ]\}?|\\thinspace|'|~)\s*(?=\d{3}(?!\d))", ""),
        (r"&lt;", "<"),
        (r"&gt;", ">"),
        (r":=", "="),
        (r"\\surd(?![A-Za-z])", r"\\sqrt "),
        (r"\\colon(?![A-Za-z])|(?<=\d)\s+to\s+(?=\d)", ":"),
        (r"\+/-", r"\\pm "),
        (r"\\widebar(?![A-Za-z])", r"\\overline"),
        (r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"(?<=_)\{([^{}]*?)\\(?:right|long)?arrow(?![A-Za-z])", r"{\1\\to "),
        (r"(?:\{\})?\^\{?(\d+)\}?(?:\\!)*/_\{?(\d+)\}?", r"\\frac{\1}{\2}"),
        (r"(?:\{\})?[\^_]\{?(\d+)\}?C_\{?(\d+)\}?", r"\\binom{\1}{\2}"),
        (r"(?:\{\})?[\^_]\{?(\d+)\}?P_\{?(\d+)\}?", r"\2!\\binom{\1}{\2}"),
        (r"\\[pb]mod(?![A-Za-z])|\\mod(?![A-Za-z])|(?<![A-Za-z\\])mod(?![A-Za-z])", r"\\mod "),
        (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:leq|leqslant|leqq)(?![A-Za-z])", r"\\le "),
        (r"\\(?:geq|geqslant|geqq)(?![A-Za-z])", r"\\ge "),
        (r"\\(?:neq)(?![A-Za-z])", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"<=(?!>)", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"\\(?:iff|(?:Long|long)?(?:Left|left)rightarrow)(?![A-Za-z])|<=>|<->", r"\\iff "),
        (r"\\(?:Rightarrow|Longrightarrow|rightarrow|longrightarrow|therefore|to(?![^{}]*\})|"
         r"mapsto)(?![A-Za-z])|=>|->", r"\\implies "),
        (r"\\(?:sim|simeq|cong|approxeq)(?![A-Za-z])|~=", r"\\approx "),
        (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset "),
        (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
        (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\(?:cdots|ldots|dots)(?![A-Za-z])|\.\.\.", r"\\ldots "),
        (r"\\%|\\?\b(?:percent(?:age)?|pct)\b", "%"),
        (r"\^\s*\{\s*\\circ\s*\}|\\degrees?(?![A-Za-z])|(?<=\d)\s*\\circ(?![A-Za-z])", r"^\\circ "),
        (r"(?<!\\)\\(?:quad|qquad|hspace\{[^{}]*\}|[,;:! ])|~|[\t\r\n]", " "),
        (r"(?<=[\w)}\]])\*\*(?=[\w({-])", "^"),
        # Not vmatrix: that is a determinant.
        (r"\\begin\{(?:[bpB]?(?:small)?matrix|array)\}(?:\s*\{[clr| ]*\})?", r"\\begin{matrix}"),
        (r"\\end\{(?:[bpB]?(?:small)?matrix|array)\}", r"\\end{matrix}"),
        (r"\\\\\s*\[-?[0-9.]+ ?(?:pt|em|ex|mm|cm)\]", r"\\\\"),
        (r"\\\{\s*\\\}|^\s*\{\s*\}\s*$", r"\\emptyset "),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"^([^{}]*)\\over(?![A-Za-z])([^{}]*)$", r"\\frac{\1}{\2}"),
        (r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt"),
        (r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
        # Times of day: `7:30 p.m.`, `7:30 PM`, `7:30pm`. Without dots and colon they are letters.
        (r"(?<=\d)\s*[aA]\.\s?[mM](?:\.|(?![A-Za-z]))", " am"),
        (r"(?<=\d)\s*[pP]\.\s?[mM](?:\.|(?![A-Za-z]))", " pm"),
        (r"(?:(?<=:[0-5]\d)\s*|(?<=\d)\s+)(?:AM|am)(?![A-Za-z])", " am"),
        (r"(?:(?<=:[0-5]\d)\s*|(?<=\d)\s+)(?:PM|pm)(?![A-Za-z])", " pm"),
        # `4\sqrt{2} (\approx 5.66)`
        (r"(?<=\S)\s*\(\s*(?:or\s+)?(?:\\approx(?![A-Za-z])|(?:approximately|approx\.?|about|roughly)"
         r"(?![A-Za-z]))\s*([^()]*)\)\s*$", r" \\approx \1"),
        (r"\s+", " "),
        (r" ?([\^_]) ?", r"\1"),
    )
)  # fmt: skip
_LEAD = re.compile(
    r"(?:#+|\\approx(?![A-Za-z])|(?:approximately|approx\.?|about|roughly|around)(?![A-Za-z])|"
    r"ans\s*[:.=]|(?:so |thus |hence )?(?:the )?(?:final )?answer(?: is| =)?\s*:?|"
    r"(?:la |a |die )?(?:r[ée]ponse|respuesta|risposta|resposta|antwort)"
    r"(?: est| es| è| é| ist)?\s*:?|"
    r"(?:最终)?答案\s*[是为為]?\s*:?|答え\s*は?\s*:?|정답\s*은?\s*:?|ответ\s*:?)\s*",
    re.IGNORECASE,
)
_ORDINAL = re.compile(
    r"(?<![\w.^])(?P<number>(?:[0-9]+/)?[0-9][0-9,]*+)\s*\^?\s*\{?\s*(?P<ending>st|nd|rd|th)\s*\}?"
    r"(?![A-Za-z])"
)
_WORDS = re.compile(r"(?:[0-9]+(?![0-9A-Za-z])|[A-Za-z]{2,}(?![A-Za-z0-9])|[ ,;])*")
_EXCEPT = re.compile(
    r"(?:(?:(?:[A-Za-z] ?\\in ?)?\\reals ?[,|]? ?)?(?P<name>\\?[A-Za-z]+(?:_\w)?) ?\\ne(?![A-Za-z])"
    r"|(?:\\reals|(?i:(?:all )?real numbers?)(?: x)?) (?:except|other than|excluding)(?: for)?)"
    r" *(?P<points>[^=<>|]+)"
)
_OR = re.compile(r"\bor\b|\\(?:lor|vee)(?![A-Za-z])")
_PARAMETER = re.compile(
    r"(?P<rest>.*?)\s*(?:[,;:|]|\(|(?:for|where|with)(?:\s+(?:all|any|some|every))?\s)?\s*"
    r"(?=.*(?:\\in|integer))(?:(?:any )?integers? )?"
    r"(?P<name>[A-Za-z])(?: ?\\in ?Z| (?:is )?an(?:y)? integer)?\s*\)?(?P<set>\\\})?"
)
"""`k\\pi, k \\in \\mathbb{Z}`, `k\\pi for any integer k`"""
_MAX_CHARS = 500
"""The longest answer that is searched for an integer parameter."""
_DOUBLED = re.compile(r"\\(?=\\[A-Za-z])")
_DELIMITED = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))


def plain(text: str) -> str:
    """The answer in one spelling; the same answer in two may still differ (`0.5`, `1/2`)."""
    if not text.isascii():
        text = _ascii(text)
    text = _undelimited(text.strip())
    text = _unfonted(_COLOR.sub(" ", _REALS.sub(r"\\reals ", text)))
    if "matrix" not in text and "array" not in text:
        text = _DOUBLED.sub("", text)  # text that was escaped twice
    text = text.replace("\\$", " \\dollar ").replace("$", "")
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    text = text.replace(r"\dollar", r"\dollar ").replace("  ", " ").strip()
    lead = _LEAD.match(text)
    if lead and lead.end() < len(text):
        text = text[lead.end() :]
    return _undelimited(_unpunctuated(_of_k(text)))


def _of_k(text: str) -> str:
    """Leave out the domain of its integer parameter, which is called k then."""
    named = len(text) < _MAX_CHARS and (r"\in" in text or "integer" in text)
    found = _PARAMETER.fullmatch(text) if named else None
    if found is None or re.search(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])", rest := found["rest"]):
        return text
    name = re.compile(rf"(?<![A-Za-z\\]){found['name']}(?![A-Za-z])")
    if not name.search(rest) or (found["set"] and not rest.startswith(r"\{")):
        return text
    rest = rest.removeprefix(r"\{") if found["set"] else rest
    return rest if re.search(r"(?<![A-Za-z\\])k(?![A-Za-z])", rest) else name.sub("k", rest)


def without_ordinals(text: str) -> str:
    """`9th`, `2^{nd} day`, `1/6th` as the numbers; `2nd` beside other signs is a product."""
    numbers = _ORDINAL.sub(_number_of, text)
    return numbers if numbers != text and _WORDS.fullmatch(re.sub("[0-9]+/", "", numbers)) else text


def _number_of(ordinal: re.Match[str]) -> str:
    number, is_teen = ordinal["number"], ordinal["number"][-2:-1] == "1"
    ending = "th" if is_teen else {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")
    return f"{number} " if ordinal["ending"] == ending else ordinal.group()


def all_but(text: str) -> str:
    r"""`x \ne \pm 2`, `real numbers except 2` as a difference of sets; other text as it is."""
    found = _EXCEPT.fullmatch(text)
    if found is None:
        return text
    if found["name"] and _OR.search(found["points"]):  # `x \ne 2 or x \ne 3` holds for every x
        return text
    again = rf"(?<![A-Za-z\\]){re.escape(found['name'] or 'x')} ?\\ne(?![A-Za-z])"
    points = re.sub(again, "", found["points"]).replace(" and ", ",")
    return text if r"\ne" in points else rf"\reals \setminus \{{{points}\}}"


def _unfonted(text: str) -> str:
    """Put a space in place of each font's command and of its braces, however they are nested."""
    parts: list[str] = []
    of_fonts: list[bool] = []
    start = 0
    for found in _BRACE.finditer(text):
        brace, is_font = found.group(), found["font"] is not None
        if is_font or brace == "{":
            of_fonts.append(is_font)
        elif brace == "}":
            is_font = bool(of_fonts) and of_fonts.pop()
        if is_font:
            parts += [text[start : found.start()], " "]
            start = found.end()
    return text if of_fonts else "".join((*parts, text[start:]))


def _ascii(text: str) -> str:
    text = _SMALL_FRACTION.sub(
        lambda found: rf"\frac{{{found[1].translate(_SUPER)}}}{{{found[2].translate(_SUB)}}}", text
    )
    text = _BARRED.sub(lambda found: rf"\overline{{{found.group()[::2]}}}", text)
    text = _SUPERS.sub(lambda found: "^{" + found.group().translate(_SUPER) + "}", text)
    text = _SUBS.sub(lambda found: "_{" + found.group().translate(_SUB) + "}", text)
    return "".join(char if char.isascii() else _one(char) for char in text)


def _one(char: str) -> str:
    if char in _UNICODE:
        return _UNICODE[char]
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    spelled = unicodedata.normalize("NFKC", char)
    if greek := _GREEK.fullmatch(unicodedata.name(spelled[:1], "")):
        name = greek[2].lower().replace("lamda", "lambda")
        return "\\" + (name.capitalize() if greek[1] == "CAPITAL" else name) + " "
    top, slash, bottom = spelled.partition("⁄")
    if slash:
        return rf"\frac{{{top}}}{{{bottom}}}"
    return spelled


def _undelimited(text: str) -> str:
    """Leave out the marks of mathematics or emphasis around the whole of it."""
    changed = True
    while changed:
        changed = False
        for opening, closing in _DELIMITED:
            inner = text[len(opening) : -len(closing)]
            whole = len(text) >= len(opening) + len(closing) + 1
            if (
                whole
                and text.startswith(opening)
                and text.endswith(closing)
                and not inner.endswith("\\")
                and opening not in inner
            ):
                text, changed = inner.strip(), True
    return text


def _unpunctuated(text: str) -> str:
    """Leave out the end of the sentence that it stood in."""
    while text.endswith((".", ",", ";", ":", " ?", "\\")):
        text = text[:-1].rstrip()
    return text.strip("\"'") if text[:1] in "\"'" else text
