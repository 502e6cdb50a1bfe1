"""Finds the option that a free-form reply names, by pure text rules.

The rules are those of VLMEvalKit (matching_util.can_infer, exact matching, no judge model) and of MMMU's own parser,
reimplemented from their behaviour and tested against recorded outputs of both (tests/eval/official_scores.json).
"""

import random
import re

REFUSED = "Z"
"""VLMEvalKit's letter for a refusal."""
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])", re.IGNORECASE)
NUM_LAST_WORDS = 4
"""A letter counts only among this many last words: "A dog is what I see here today" names no option."""


def infer_choice(reply: str, choices: dict[str, str]) -> str | None:
    """Returns the letter that a reply names, by the letter or else by the text of one option. Returns REFUSED for a
    refusal, None if the reply names no option."""
    return infer_letter(reply, choices) or infer_text(reply, choices)


def infer_letter(reply: str, choices: dict[str, str]) -> str | None:
    if "Failed to obtain answer via API" in reply:
        return None
    if any(refusal in reply for refusal in REFUSALS):
        return REFUSED
    words = reply.translate(SEPARATORS).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - NUM_LAST_WORDS:
        return letters[0]
    if not letters and REFUSED in words:
        return REFUSED
    said = ANSWER_IS.search(reply)
    return said[1].upper() if said and said[1].upper() in choices else None


def infer_text(reply: str, choices: dict[str, str]) -> str | None:
    """Returns the only option whose text is in the reply; None if the reply is over twice as long as all options."""
    texts = {letter: text.lower() for letter, text in choices.items()}
    if len(reply) > 2 * sum(len(text) for text in texts.values()):
        return None
    letters = [letter for letter, text in texts.items() if text in reply.lower()]
    return letters[0] if len(letters) == 1 else None


def parse_mmmu_choice(reply: str, choices: dict[str, str], rng: random.Random) -> tuple[str, bool]:
    """Returns (letter, whether it was found) by MMMU's parser. It looks for "(A)", then "A ", then "A.", then, if the
    reply has more than five words, for the text of an option. The last one in the reply wins. A reply that names no
    option gets a random letter."""
    for character in ",.!?;:'":
        reply = reply.strip(character)
    reply = f" {reply} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        letters = [letter for letter in choices if form.format(letter) in reply]
        if letters:
            return max(letters, key=lambda letter: reply.rfind(place.format(letter))), True
    if len(reply.split()) > 5:
        letters = [letter for letter, text in choices.items() if text.lower() in reply.lower()]
        if letters:
            return max(letters, key=lambda letter: reply.lower().rfind(choices[letter].lower())), True
    return rng.choice(list(choices)), False
