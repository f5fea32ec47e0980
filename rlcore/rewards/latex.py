"""Normalize LaTeX answers: one spelling for equivalent notations, and the value separated from its unit.

No value is changed or lost: unrecognized text stays as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

DEGREE = r"^\circ"
_SPELLINGS = {
    "\u2212": "-", "\u00b0": DEGREE, "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u00b1": r"\pm ",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\n": " ", "\t": " ",
    "\u00a0": "~", "\u2009": r"\,", "\u202f": r"\,", r"\thinspace": r"\,", r"\displaystyle": "", r"\(": "", r"\)": "",
    r"\varnothing": r"\emptyset", r"\langle": "(", r"\rangle": ")",
}  # fmt: skip
_NO_BREAK = r"\\[,;: ]|~"
_SPACE = rf"(?:{_NO_BREAK}| )"
THOUSANDS = rf"[1-9]\d{{0,2}}(?:(?:,\\!|\{{,\}}|,|{_NO_BREAK})\d{{3}})+(?!\d)"  # no plain space: running text
_GROUPED = re.compile(rf"(?<![\d.,])[1-9]\d{{0,2}}(?:(?:,\\!|\{{,\}}|,|{_SPACE})\d{{3}})+(?![\d,]|{_SPACE}\d)")
_ARGUMENT = r"\s*(\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|[^\s{}\\])"
_TEXT = r"\\(?:text|mbox|operatorname)(?:bf|it|rm|sf|normal)?\s*\{|\\math(?:rm|bf|it|sf)\s*\{"
_PERCENT = r"\\?%|\\text\{\s*percent\s*\}|(?<![a-z])percent(?![a-z])"
_RING = r"\\(?:circ|degree)(?![a-z])"
_DEGREE = rf"\^\s*{_RING}|\^\s*\{{\s*{_RING}\s*\}}|\\(?:text)?degree(?![a-z])|\\text\{{\s*degrees?\s*\}}"
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:left|right)(?![A-Za-z])\.?|\\[bB]igg?[lrm]?(?![A-Za-z])", ""),
    (r"\\math(?:rm|bf|it|sf)\s*\{([eid])\}", r"\1"),
    (_TEXT, r"\\text{"),
    (rf"\\text\{{(?:{_SPACE})*\}}|^(?:{_SPACE})+|(?<!\\)\\$", ""),
    (r"(?<![\d}])\\text\{([A-Za-z])\}|\\text\{\s*([-+]?\d[\d.,]*)\s*\}", lambda found: found[1] or found[2]),
    (r"^\\text\{\s*([-+]?\d[^{}]*)\}$", r"\1"),
    (rf"\\[dtc]?frac(?![A-Za-z]){_ARGUMENT}{_ARGUMENT}", lambda found: rf"\frac{_braced(found[1])}{_braced(found[2])}"),
    (r"\\sqrt\s*(\\[A-Za-z]+|[^\s{}\\\[(])", r"\\sqrt{\1}"),
    (r"\^(\d)(?=\d)", r"^{\1}"),  # in LaTeX ^ takes one character
    (rf"\s*(?:{_DEGREE})|(?<=\d)\s+degrees?(?![a-z])", lambda found: DEGREE),
    (rf"\s*(?:{_PERCENT})", r"\\%"),
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2}"),
    (r"^\((\d+)\)$", r"\1"),
)]  # fmt: skip
_BASE = re.compile(r"(?<![\w.])([0-9A-Z]*[0-9][0-9A-Z]*)(?:\.([0-9A-Z]+))?_(?:\{(\d{1,2})\}|(\d))(?!\w)")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
_UNIT_TEXT = re.compile(rf"(.*[^\s\\,;~])(?:{_SPACE})*\\text\{{([^{{}}]+)\}}\s*(?:\^\{{?(\d)\}}?)?")
_UNIT_WORD = re.compile(rf"(.*[\d}}])(?:{_SPACE})+([A-Za-z.]+)(?:\^\{{?(\d)\}}?)?")
_NO_UNIT = re.compile(r"\b(?:and|or|if|when|for|is|are|not|no|more|less|than|base)\b|(?<!\^)\d")
UNITS = {
    name: (dimension, Fraction(size))
    for dimension, size, names in (
        ("metre", "1/1000", "mm millimeter"), ("metre", "1/100", "cm centimeter"), ("metre", "1", "m meter metre"),
        ("metre", "1000", "km kilometer"), ("foot", "1/12", "in inch inche"), ("foot", "1", "ft foot feet"),
        ("foot", "3", "yd yard"), ("foot", "5280", "mi mile"), ("gram", "1/1000", "mg milligram"), ("gram", "1", "g gram"),
        ("gram", "1000", "kg kilogram"), ("litre", "1/1000", "ml milliliter"), ("litre", "1", "l liter litre"),
        ("dollar", "1/100", "cent"), ("dollar", "1", "dollar"), ("second", "1", "s sec second"), ("second", "60", "min minute"),
        ("second", "3600", "h hr hour"), ("second", "86400", "day"),
    )
    for name in names.split()
}  # fmt: skip
_WORDS = {*UNITS, "unit", "pm", "am"} - {"m", "g", "l", "s", "h", "in", "min"}  # recognized as units without \text{} too


@dataclass(frozen=True)
class Measured:
    """An answer's value as cleaned LaTeX, and its unit."""

    value: str
    unit: str = ""  # singular, lower case, no dots
    power: int = 1  # exponent of the unit
    percent: bool = False


def measured(text: str, grouped: bool = True) -> Measured:
    """Clean the text and split off a unit at its end: `\\text{...}`, a known word, a percent sign."""
    money = "dollar" if r"\$" in text else ""
    text = clean(text, grouped)
    if text.endswith(r"\%"):
        return Measured(text.removesuffix(r"\%").strip(), percent=True)
    found = _UNIT_TEXT.fullmatch(text)
    if found and not _NO_UNIT.search(found[2]) and (len(found[2].strip()) > 1 or found[2].strip() in UNITS):
        return Measured(found[1], *_unit(found[2], found[3]))
    found = _UNIT_WORD.fullmatch(text)
    if found and _unit(found[2])[0] in _WORDS:
        return Measured(found[1], *_unit(found[2], found[3]))
    return Measured(text, money)


def clean(text: str, grouped: bool = True) -> str:
    """Remove dollars, sizing and a final dot; unify the spelling of fractions, roots, texts, degrees and percents; write out
    powers of ten; convert other bases to ten. grouped: remove thousands separators, else every comma separates a list."""
    for written, read in _SPELLINGS.items():
        text = text.replace(written, read)
    text = text.replace(r"\$", "").replace("$", "").strip().removesuffix(".").strip()
    text = _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text) if grouped else text.replace(",", ", ")
    text = text.replace(r"\!", "")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text).strip()
    return _BASE.sub(_in_base_ten, text)


def separates(text: str) -> bool:
    """Whether a comma between digits is ambiguous, a list separator or a thousands separator: 100,200."""
    return bool(re.search(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d)", text))


def exact(text: str) -> str:
    """Rewrite decimal numbers as fractions: a float would round them."""
    return _DECIMAL.sub(lambda found: rf"\frac{{{found[1]}{found[2]}}}{{1{'0' * len(found[2])}}}", text)


def words(text: str) -> str:
    """Normalize words: without \\text{}, extra spaces, capitals, a final dot, parentheses around a word."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(rf"(?:{_SPACE}|\s)+", " ", text).casefold().strip(" .")
    return text[1:-1] if re.fullmatch(r"\(\w+\)", text) else text


def _unit(text: str, power: str | None = None) -> tuple[str, int]:
    """`Square Inches` and `inch^2` -> (inch, 2)."""
    text = re.sub(rf"(?:{_SPACE}|\s)+", " ", text).casefold().replace(".", "").strip()
    found = re.fullmatch(r"(square |sq |cubic )?(.*?)(?:\^\{?(\d)\}?)?", text)
    kind, name, inside = found.groups() if found else (None, text, None)
    name = name if name in UNITS else name.removesuffix("s")
    return name, int(power or inside or {"square ": 2, "sq ": 2, "cubic ": 3}.get(kind or "", 1))


def _in_base_ten(found: re.Match[str]) -> str:
    whole, part, base = found[1], found[2] or "", int(found[3] or found[4])
    digits = [int(digit, 36) for digit in whole + part]
    if not 2 <= base <= 36 or max(digits) >= base:
        return found[0]
    value = Fraction(int(whole + part, base), base ** len(part))
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else f"{{{argument}}}"
