"""Which option a free-form reply names. Pure text rules.

The rules are those of VLMEvalKit (matching_util.can_infer, exact matching, no judge model) and of MMMU's own parser,
written anew from their behaviour and held to recorded outputs of both (tests/eval/official_scores.json).
"""

import random
import re

REFUSED = "Z"
"""What VLMEvalKit calls a reply that refuses."""
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])", re.IGNORECASE)
NUM_LAST_WORDS = 4
"""A letter counts where it stands among the last words: "A dog is what I see here today" names no option."""


def infer_choice(reply: str, choices: dict[str, str]) -> str | None:
    """The letter a reply names, by letter or else by the text of one option; REFUSED, or None where neither does."""
    return infer_letter(reply, choices) or infer_text(reply, choices)


def infer_letter(reply: str, choices: dict[str, str]) -> str | None:
    if "Failed to obtain answer via API" in reply:
        return None
    if any(refusal in reply for refusal in REFUSALS):
        return REFUSED
    words = reply.translate(SEPARATORS).split()
    found = [letter for letter in choices if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - NUM_LAST_WORDS:
        return found[0]
    if not found and REFUSED in words:
        return REFUSED
    said = ANSWER_IS.search(reply)
    return said[1].upper() if said and said[1].upper() in choices else None


def infer_text(reply: str, choices: dict[str, str]) -> str | None:
    """The only option whose text stands in the reply, unless the reply is far longer than all options together."""
    texts = {letter: text.lower() for letter, text in choices.items()}
    if len(reply) > 2 * sum(len(text) for text in texts.values()):
        return None
    found = [letter for letter, text in texts.items() if text in reply.lower()]
    return found[0] if len(found) == 1 else None


def parse_mmmu_choice(reply: str, choices: dict[str, str], rng: random.Random) -> tuple[str, bool]:
    """(letter, whether it was found) by MMMU's parser: "(A)", then "A ", then "A.", then the text of an option in a
    reply of more than five words; of several the last one. A reply that names none gets a random letter."""
    for character in ",.!?;:'":
        reply = reply.strip(character)
    reply = f" {reply} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in choices if form.format(letter) in reply]
        if found:
            return max(found, key=lambda letter: reply.rfind(place.format(letter))), True
    if len(reply.split()) > 5:
        found = [letter for letter, text in choices.items() if text.lower() in reply.lower()]
        if found:
            return max(found, key=lambda letter: reply.lower().rfind(choices[letter].lower())), True
    return rng.choice(list(choices)), False
