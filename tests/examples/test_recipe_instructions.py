"""The rules that judge answers to instructions of our own."""

import random

import pytest
from recipe.instructions import THINGS, Instruction, all_instructions

FRUITS = Instruction("fruits", 2, "commas", "")


def test_every_good_answer_follows_and_every_bad_one_does_not():
    rng = random.Random(0)
    instructions = all_instructions()
    assert len(set(instructions)) == len({i.text for i in instructions}) == 360
    for instruction in instructions:
        for _ in range(3):
            good, bad = instruction.answer(rng), instruction.bad_answer(rng)
            assert instruction.follows(good) and instruction.knows(good)
            assert not instruction.follows(bad) and not instruction.knows(bad)


@pytest.mark.parametrize(
    "answer, follows, knows",
    [
        ("apple, cherry", True, True),
        (" apple, cherry\n", True, True),
        ("stone, cherry", True, False),
        ("Apple, Cherry", True, True),
        ("apple cherry", False, False),
        ("apple, apple", False, False),
        ("apple", False, False),
        ("apple, cherry, pear", False, False),
        ("Here are two fruits: apple, cherry", False, False),
        ("apple, cherry.", False, False),
        ("", False, False),
    ],
)
def test_two_fruits_separated_by_commas(answer, follows, knows):
    assert (FRUITS.follows(answer), FRUITS.knows(answer)) == (follows, knows)


@pytest.mark.parametrize(
    "form, extra, answer",
    [
        ("lines", "", "dog\ncat"),
        ("dashes", "capitals", "- DOG\n- CAT"),
        ("numbers", "end", "1. dog\n2. cat\ndone"),
        ("and", "quotes", '"dog and cat"'),
    ],
)
def test_each_form(form, extra, answer):
    asked = Instruction("animals", 2, form, extra)
    assert asked.write(["dog", "cat"]) == answer and asked.knows(answer)
    others = [i for i in all_instructions() if i.things == "animals" and i.count == 2 and i != asked]
    assert [i for i in others if i.follows(answer)] in ([], [Instruction("animals", 2, form, "")])


def test_things_are_single_words_and_enough():
    assert all(len(words) >= 6 and all(word.isalpha() for word in words) for words in THINGS.values())
