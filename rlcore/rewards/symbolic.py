"""Symbolic equality of answers: by their texts, as exact constants, else by sympy through math-verify.

It may never return: rewards call it through `rlcore.rewards.bounded`, which has a time limit.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import parse, verify
from sympy import Expr, FiniteSet, Float, I, Interval, MatrixBase, Mul, Rational, Symbol, Tuple, UnevaluatedExpr, simplify

from rlcore.rewards.latex import DEGREE, UNITS, Measured, exact, measured, separates, words
from rlcore.rewards.numbers import number

_SPELLING = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_TEXT_ONLY = re.compile(r"(?<![\w.])[\d.]+_|\d:0|'|\\prime")  # digits invalid in their base, times of day, derivatives
_COMPLEX = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
_DIGITS = 50  # significant digits in which equal constants agree


def equal(given: str, answer: str) -> bool:
    """Whether a box's content equals the answer. Text without content, spaces or a lone sign, equals nothing."""
    readings = (True, False) if separates(given) and separates(answer) else (True,)
    sides = product(_sides(given), _sides(answer), readings)
    return any(_equal(measured(left, grouped), measured(right, grouped)) for left, right, grouped in sides)


def says(response: str, answer: str) -> bool:
    """Whether the expression that math-verify finds in a response without a box equals the answer."""
    found = [_exact(one) for one in parse(response, parsing_timeout=0)[:1] if not isinstance(one, str)]
    found += [100 * one for one in found if isinstance(one, Mul) and one.has(UnevaluatedExpr) and one.args[0].is_Integer]  # 42%
    return any(_same(left, right) for left, right in product(found, _parsed(measured(answer).value)))


def _equal(given: Measured, answer: Measured) -> bool:
    if not given.value or not answer.value or not (scale := _scale(given, answer)):
        return False
    if given.percent != answer.percent:
        return _percent(given, answer)
    value = given.value if scale == 1 else rf"\frac{{{scale.numerator}}}{{{scale.denominator}}}\cdot ({given.value})"
    return _values_equal(value, answer.value)


def _scale(given: Measured, answer: Measured) -> Fraction | None:
    """Factor from the given value's unit to the answer's: 1 where one has none, None where they are incompatible."""
    if not (_measures(given.unit) and _measures(answer.unit)):
        return Fraction(1)
    if given.power != answer.power:
        return None
    if given.unit == answer.unit or "unit" in (given.unit, answer.unit):
        return Fraction(1)
    (kind, size), (wanted, unit) = UNITS.get(given.unit, (given.unit, 1)), UNITS.get(answer.unit, (answer.unit, 1))
    return Fraction(size / unit) ** given.power if kind == wanted else None


def _measures(unit: str) -> bool:
    """Whether the word is a unit of measurement, not a noun for counted things."""
    return unit in (*UNITS, "unit", "am", "pm") or "/" in unit or " per " in unit


def _percent(given: Measured, answer: Measured) -> bool:
    """Compare a percentage with a plain number: 50% is 0.5, and 50 where the sign was left out; 0.5% is not 0.5."""
    share, other = (given.value, answer.value) if given.percent else (answer.value, given.value)
    dropped = not re.fullmatch(r"-?0?\.\d+", share) and _values_equal(share, other)
    return dropped or _values_equal(rf"\frac{{{share}}}{{100}}", other)


def _values_equal(given: str, answer: str) -> bool:
    if re.sub(r"\s", "", given) == re.sub(r"\s", "", answer):
        return True
    numbers = number(given), number(answer)
    if None not in numbers and "," not in given + answer:
        return numbers[0] == numbers[1]
    if "\\text" in given + answer and words(given) == words(answer):
        return bool(words(given))
    if _TEXT_ONLY.search(given) or _TEXT_ONLY.search(answer):
        return False
    return any(_same(left, right) for left, right in product(_parsed(given), _parsed(answer)))


def _angles(text: str) -> list[str]:
    """Readings of the degrees in a text: dropped, and in radians; under a trigonometric function only radians."""
    if DEGREE not in text:
        return [text]
    radians = re.sub(rf"([\d.]+|\}}|\))\s*{re.escape(DEGREE)}", r"\1\\cdot \\frac{\\pi}{180}", text)
    return [radians] if _TRIGONOMETRY.search(text) else [text.replace(DEGREE, ""), radians]


def _sides(text: str) -> list[str]:
    """Candidate answers of `exact \\approx rounded`: both; a plain number before \\approx is only a step to its rounding."""
    first, *others = re.split(r"\\approx|\\doteq|\\simeq", text)
    if not others:
        return [text]
    return [others[-1]] if re.fullmatch(r"\s*-?[\d.]*\s*", first) else [first, others[-1]]


@lru_cache(maxsize=256)  # a group shares its answer
def _parsed(text: str) -> list[Any]:
    """Parse to sympy objects, one per reading of the degrees; empty where the text is not mathematics."""
    found = []
    for reading in _angles(exact(text)):
        spelled = normalize_latex(reading, _SPELLING)
        real = not _COMPLEX.search(spelled)
        try:
            found.append(_exact(latex2sympy(spelled, is_real=real, convert_degrees=False, normalization_config=None)))
        except Exception:  # antlr and sympy may raise anything on text that is not mathematics
            continue
    return found


def _exact(value: Any) -> Any:
    """Replace floats by the exact decimals they were written as, and the symbol i by the imaginary unit."""
    if not hasattr(value, "xreplace"):
        return value
    floats = {number: Rational(str(number)) for number in value.atoms(Float)}
    return value.xreplace(floats | {symbol: I for symbol in value.atoms(Symbol) if symbol.name == "i"})


def _same(given: Any, answer: Any) -> bool:
    """math-verify's verdict, but exact for constants, alone and in lists, where it rounds."""
    if _constant(given) and _constant(answer):
        return _constants_equal(given, answer)
    try:
        right = verify(answer, given, numeric_precision=2 * _DIGITS, allow_set_relation_comp=True, timeout_seconds=None)
    except Exception:  # as above
        return False
    return right and _elements_equal(_elements(given), _elements(answer))


def _constant(value: Any) -> bool:
    return isinstance(value, Expr) and not isinstance(value, MatrixBase) and bool(value.is_number)


def _constants_equal(left: Expr, right: Expr) -> bool:
    """Equality to 50 digits relative to the larger one: 1/2005! is not 0."""
    left, right = left.doit(), right.doit()
    if left == right:
        return left.is_finite is not False or left.is_infinite is True
    if (left.is_Rational and right.is_Rational) or not (left.is_finite and right.is_finite):
        return False
    values = [abs(part.evalf(2 * _DIGITS)) for part in (left - right, left, right)]
    if values[0] <= max(values[1:]) * Rational(1, 10**_DIGITS):
        return True
    return bool(values[0] < Rational(1, 10**_DIGITS) and simplify(left - right) == 0)


def _elements(value: Any) -> list[Any]:
    if isinstance(value, Interval):
        return [value.start, value.end]
    return list(value.args) if isinstance(value, FiniteSet | Tuple) else value.flat() if isinstance(value, MatrixBase) else []


def _elements_equal(left: list[Any], right: list[Any]) -> bool:
    """Whether both have the same constants; lists with other elements pass."""
    if len(left) != len(right) or not all(map(_constant, [*left, *right])):
        return True
    return all(any(_constants_equal(one, other) for other in right) for one in left)


def prepare() -> None:
    """Warm up: build the parsers and caches of a process's first comparison."""
    equal(r"\frac{\sqrt{2}x}{2}", r"\frac{x}{\sqrt{2}}")
