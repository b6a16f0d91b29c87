"""Instructions whose answers a rule can judge: so many things of a kind, in a form that is asked for.

    Name two fruits, separated by commas. Write in capital letters.      ->      APPLE, CHERRY

Each has a good answer, and a bad one that breaks one of its rules, as DPO needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

THINGS = {
    "fruits": ["apple", "banana", "cherry", "pear", "orange", "grape", "peach", "plum", "mango", "lemon"],
    "animals": ["dog", "cat", "horse", "cow", "lion", "tiger", "bear", "wolf", "sheep", "goat"],
    "colors": ["red", "blue", "green", "yellow", "black", "white", "purple", "orange", "brown", "pink"],
    "metals": ["iron", "gold", "silver", "copper", "zinc", "tin", "lead", "nickel", "aluminum", "titanium"],
    "planets": ["mercury", "venus", "earth", "mars", "jupiter", "saturn", "uranus", "neptune"],
    "drinks": ["water", "tea", "coffee", "milk", "juice", "beer", "wine", "lemonade"],
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
FORMS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "commas": ("separated by commas", lambda items: ", ".join(items)),
    "lines": ("each on a line of its own", lambda items: "\n".join(items)),
    "dashes": ("each on a line that begins with a dash", lambda items: "\n".join(f"- {item}" for item in items)),
    "numbers": (
        "as a numbered list",
        lambda items: "\n".join(f"{k}. {item}" for k, item in enumerate(items, 1)),
    ),
    "and": ('joined by the word "and"', lambda items: " and ".join(items)),
}
EXTRAS: dict[str, tuple[str, Callable[[str], str]]] = {
    "": ("", lambda text: text),
    "capitals": (" Write in capital letters.", str.upper),
    "end": (' End with the word "done".', lambda text: f"{text}\ndone"),
    "quotes": (" Put the answer in quotation marks.", lambda text: f'"{text}"'),
}


@dataclass(frozen=True)
class Instruction:
    """One instruction: what is asked, and the rules of its answer."""

    things: str
    count: int
    form: str
    extra: str

    @property
    def text(self) -> str:
        return f"Name {NUMBERS[self.count]} {self.things}, {FORMS[self.form][0]}.{EXTRAS[self.extra][0]}"

    def write(self, items: list[str]) -> str:
        """The answer with these things."""
        return EXTRAS[self.extra][1](FORMS[self.form][1](items))

    def answer(self, rng: random.Random) -> str:
        return self.write(rng.sample(THINGS[self.things], self.count))

    def bad_answer(self, rng: random.Random) -> str:
        """One that breaks a rule: too many things, another form, or another extra."""
        forms = [form for form in FORMS if form != self.form]
        extras = [extra for extra in EXTRAS if extra != self.extra]
        while True:
            other = rng.choice(
                [
                    Instruction(self.things, self.count, rng.choice(forms), self.extra),
                    Instruction(self.things, self.count, self.form, rng.choice(extras)),
                ]
            )
            items = rng.sample(THINGS[self.things], self.count)
            too_many = self.write(rng.sample(THINGS[self.things], self.count + 2))
            found = rng.choice([other.write(items), too_many])
            if not self.follows(found):  # capitals, say, break nothing where none are asked for
                return found

    def follows(self, answer: str) -> bool:
        """Whether the answer is one that `write` gives for so many different things, of this kind or not.

        The things themselves are words of letters: that they are fruits is not checked.
        """
        answer = answer.strip()
        plain = _items(answer, self)
        return len(plain) == self.count == len(set(plain)) and self.write(plain) == answer

    def knows(self, answer: str) -> bool:
        """Whether the answer also names things of the kind only, of those known here."""
        return self.follows(answer) and set(_items(answer.lower(), self)) <= set(THINGS[self.things])


def _items(answer: str, instruction: Instruction) -> list[str]:
    """The words of an answer without those of its form."""
    words = [word.strip("\"'.,-0123456789") for word in answer.split()]
    if instruction.extra == "end" and words and words[-1] == "done":
        words.pop()
    return [word for word in words if word and not (instruction.form == "and" and word.lower() == "and")]


def all_instructions(seed: int = 0) -> list[Instruction]:
    """All combinations, 360, shuffled."""
    made = [Instruction(t, n, form, extra) for t in THINGS for n in NUMBERS for form in FORMS for extra in EXTRAS]
    return random.Random(seed).sample(made, len(made))
