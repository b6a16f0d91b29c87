"""The final answer in a text that a model has written, and whether it is the right one."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+(?:\.\d+)?)?(?:[eE][-+]?\d+)?")
MARKS = (r"####", r"the (?:final )?answer is\s*:?", r"\banswer\s*[:=]")  # the last of these that is there counts
UNICODE = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " "})


def extract(text: str) -> str | None:
    r"""The final answer: what \boxed holds, else what follows "####" or "the answer is", else the last number.

    Returns:
        a number as it is written but for separators, units and signs of money; other words only where they are
        marked as the answer; None without any.
    """
    text = text.translate(UNICODE)
    if (inside := _boxed(text)) is not None:
        inside = _without_latex(inside)
        return _first_number(inside) or inside.strip()
    for mark in MARKS:
        if found := list(re.finditer(mark, text, re.IGNORECASE)):
            rest = text[found[-1].end() :].strip().split("\n")[0]
            return _first_number(_without_latex(rest)) or rest.strip(" .*:$") or None
    numbers = _numbers(_without_latex(text))
    return numbers[-1] if numbers else None


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, whose braces may be nested."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len(r"\boxed{")
    for k in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[k], 0)
        if depth == 0:
            return text[begin:k]
    return text[begin:]


def _without_latex(text: str) -> str:
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text.replace("{,}", ","))
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    return text.replace("\\$", "").replace("\\!", "").replace("$", "")


def _numbers(text: str) -> list[str]:
    found = []
    for match in NUMBER.finditer(text):
        number = match.group().replace(",", "")
        if not any(c.isdigit() for c in number):
            continue
        before = text[: match.start()]
        if number[0] in "-+" and before[-1:].isdigit():  # 5-3 ends in 3
            number = number[1:]
        found.append(number.lstrip("+"))
    return found


def _first_number(text: str) -> str | None:
    """Of several, as in "3 + 4 = 7", the one after the last equal sign."""
    numbers = _numbers(text.rpartition("=")[2]) or _numbers(text)
    return numbers[0] if numbers else None


def value(text: str) -> Fraction | None:
    """The number that a text is, exactly; None if it is none.

    Example:
        >>> value("1,200.50") == value("2401/2")
        True
    """
    text = text.translate(UNICODE).strip().rstrip(".%").replace(",", "").replace("$", "").replace(" ", "")
    top, slash, bottom = text.partition("/")
    try:
        found = Fraction(top)
        return found / Fraction(bottom) if slash else found
    except (ValueError, ZeroDivisionError):
        return None


def same(answer: str | None, right: str) -> bool:
    """Whether an answer is right: the same number, or the same words but for case, spaces and a final stop."""
    if answer is None:
        return False
    numbers = value(answer), value(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _words(answer) == _words(right)


def _words(text: str) -> str:
    return re.sub(r"\s+", "", text.translate(UNICODE)).rstrip(".").casefold()
