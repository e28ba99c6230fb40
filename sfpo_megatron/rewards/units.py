"""Units of measure, by one name each: `centimetres`, `cm` and `centimeter` are one, `m` another.

A unit that only one side states is no difference (`12` and `12 cm`); units that differ are.
Nothing is converted: what was asked for in centimetres is not answered in metres.
"""

from __future__ import annotations

import re

_NAMES = """
meter metre meters metres m | centimeter centimetre centimeters centimetres cm
millimeter millimetre millimeters millimetres mm | kilometer kilometre kilometers kilometres km
megameter megametre megameters megametres Mm | decimeter decimetre dm
inch inches in | foot feet ft | yard yards yd | mile miles mi
gram grams g | kilogram kilograms kg kilos | milligram milligrams mg
megagram megagrams Mg | pound pounds lb lbs
ounce ounces oz | ton tons | tonne tonnes
second seconds sec secs s | minute minutes min mins | hour hours hr hrs h | day days
week weeks | month months | year years yr yrs
liter litre liters litres L l | milliliter millilitre milliliters millilitres mL ml
gallon gallons gal | quart quarts | pint pints | cup cups
dollar dollars usd USD bucks | cent cents | ruble rubles | won
euro euros EUR | yen JPY | rupee rupees Rs rs INR
degree degrees deg | radian radians rad
newton newtons N | joule joules J | kilojoule kilojoules kJ | watt watts W | kilowatt kilowatts kW
volt volts V | ampere amperes amp amps A | ohm ohms | hertz Hz | kelvin K | pascal pascals Pa
mole moles mol | coulomb coulombs C | electronvolt eV | calorie calories cal
acre acres | hectare hectares ha | unit units | percent
"""
_CANONICAL = {
    name: names[0]
    for names in (line.split() for line in re.split(r"[|\n]", _NAMES))
    for name in names
}
_RATES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
_SHORT = {name for name in _CANONICAL if len(name) == 1}
_SYMBOL_UNITS = {
    r"\dollar": "dollar",
    r"\euro": "euro",
    r"\pound": "pound",
    r"\yen": "yen",
    r"\cent": "cent",
    r"\rupee": "rupee",
    r"\won": "won",
    r"\ruble": "ruble",
    r"\Omega": "ohm",
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9,
           "trillion": 10**12, "dozen": 12, "lakh": 10**5, "crore": 10**7}  # fmt: skip
_SCALE_SIGNS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8, "千": 1000, "百": 100}
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_NO_NOUN = re.compile(
    r"(?:is|are|not|no|but|if|then|so|the|answer|or|and|to|which|because|since|wait|mod|pmod|"
    r"sin|cos|tan|log|ln|exp|sqrt|min|max|pi|times|over|plus|minus|base|for|when|where|with|"
    r"wrong|false|incorrect|negative|factorial|double|twice|half|halves|thirds?|"
    r"(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million)ths?)$"
)
_WORD = re.compile(
    r"(?!\\cdot(?![A-Za-z]))(\\?[^\W\d_]+\.?(?:-[a-z]+)?)(?:\^\{?\s*(-?[0-9])\s*\}?)?|"
    r"(/|\\cdot ?|\*|\s|-)"
)

_UNIT_IN_BRACES = re.compile(
    r"(?P<value>.*?[0-9)}\]!.])(?P<space>\s*)(?:\{(?P<whole>\s*[A-Za-z][^{}]*)\}|"
    r"\\frac\s*\{(?P<top>\s*[A-Za-z][^{}]*)\}\s*\{(?P<bottom>\s*[A-Za-z][^{}]*)\})"
)


def without_braces(quantity: str) -> str:
    r"""`12 \frac{m}{s}` as `12 m/s`, `12 {cm}` as `12 cm`; other text as it is."""
    found = _UNIT_IN_BRACES.fullmatch(quantity)
    if found is None:
        return quantity
    unit = found["whole"] or f"{found['top'].rstrip()}/{found['bottom'].strip()}"
    return f"{found['value']}{found['space']}{unit.rstrip()}"


def scale_of(phrase: str) -> tuple[int, str]:
    """What `million`, `dozen`... at the beginning of a phrase multiply a number by, 1 without; the
    rest of it."""
    factor = 1
    while by := _SCALE_SIGNS.get(phrase[:1]):
        factor, phrase = factor * by, phrase[1:]
    while (word := re.match(r"([A-Za-z]+?)s?(?![A-Za-z])\s*", phrase)) and (
        by := _SCALES.get(word[1].lower())
    ):
        factor, phrase = factor * by, phrase[word.end() :]
    return factor, phrase


def unit_of(phrase: str, *, spaced: bool) -> str | None:
    """One name for a unit or a noun behind a number; None if the phrase is neither. `spaced`: a
    space stands before it, without which a single letter is a variable (`12t`, `5m`), but for the
    second of `12km/h`."""
    phrase = _RATES.get(phrase.lower().rstrip("."), phrase)
    factors: list[str] = []
    power, per, known, index = 0, False, True, 0
    while index < len(phrase):
        found = _WORD.match(phrase, index)
        if found is None:
            return None
        index = found.end()
        word = (found[1] or found[3] or "").rstrip(".")
        if found[3] is not None:
            per = per or found[3] == "/"
        elif word == "per":
            per = True
        elif word in _POWERS:
            if word.endswith("d") and factors:
                factors[-1] += f"^{_POWERS[word]}"
            power = 0 if word.endswith("d") else _POWERS[word]
        else:
            name = _CANONICAL.get(word) or _CANONICAL.get(word.lower() if word[1:] else "") or ""
            name = _SYMBOL_UNITS.get(
                word, "" if word in _SHORT and not (spaced or (per and factors)) else name
            )
            if not name:
                known, name = False, word.lower()
                far = not name.isascii()  # `42元`, which is written without a space
                if not far and (len(name) < 3 or not spaced or _NO_NOUN.match(name)):
                    return None
                if name.startswith("\\"):
                    return None
            exponent = int(found[2] or power or 1) * (
                -1 if per and not (found[2] or "").startswith("-") else 1
            )
            factors.append(name if exponent == 1 else f"{name}^{exponent}")
            power = 0
    if not factors:
        return None
    if known:
        return "*".join(sorted(factors))
    if len(factors) > 4:
        return None
    noun = factors[-1]  # `5 different ways` counts ways
    return noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else noun
