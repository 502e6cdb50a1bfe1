"""Conversations in the forms that data sets have, to one form: human and gpt in turns, as in LLaVA's data.

    conversations   [{"from": "human" | "user", "value": "<image>\\nWhat?"}, {"from": "gpt" | "assistant", ..}, ..]
    messages        [{"role": "user", "content": "What?" | [{"type": "image"}, {"type": "text", "text": "What?"}]}, ..]
    texts           [{"user": "What?", "assistant": "A cat."}, ..]                                   (FineVision)

The k-th marker stands for the k-th picture; a part of a message may name its picture by index, or hold it as a data
URL. Pictures that nothing places come first, and a last question without an answer is left out; both are noted.
"""

from collections.abc import Iterator
from typing import Any

from oq2vl_jax.data.samples.images import ImageError, embedded_image
from oq2vl_jax.data.samples.shards import Sample

TALKS = ("conversations", "messages", "texts")
"""Fields of a record that hold a conversation."""
MARKER = "<image>"
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


class ChatError(Exception):
    """A conversation that cannot be used; `reason` is the word under which it is counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def with_turns(sample: Sample, places_unmarked: bool = True) -> Sample:
    """Returns the sample with its conversation in LLaVA's form; other samples as they are. A problem is stored in it.

    places_unmarked: puts pictures that nothing places before the first question; False counts such a sample out.
    """
    if sample.problem is not None or sample.conversations is None:
        return sample
    try:
        placed = _Pictures(sample.images)
        turns, num_placed = [], []
        for speaker, content in messages_of(sample.conversations):
            num_placed.append(len(placed.chosen))
            turns.append({"from": speaker, "value": placed.text_of(content)})
        notes = list(sample.notes)
        if len(turns) > 1 and turns[0]["from"] != "gpt" and turns[-1]["from"] == "human":
            turns.pop()
            placed.chosen = placed.chosen[: num_placed[-1]]
            notes.append("last_question_unanswered")
        images = placed.chosen
        if placed.has_unplaced:
            first = next((turn for turn in turns if turn["from"] == "human"), None)
            if images or first is None or not places_unmarked:
                raise ChatError("image_count_mismatch")
            images = list(sample.images)
            first["value"] = f"{MARKER}\n" * len(images) + first["value"]
            notes.append("image_without_marker")
    except (ChatError, ImageError) as problem:
        return sample._replace(problem=problem.reason)
    return sample._replace(conversations=turns, images=images, notes=tuple(notes))


def messages_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields (speaker, content) of each message of a conversation in any of the forms."""
    if not isinstance(value, list):
        raise ChatError("conversation_invalid")
    for message in value:
        if not isinstance(message, dict):
            raise ChatError("conversation_invalid")
        if "user" in message and "assistant" in message:
            yield "human", message["user"]
            yield "gpt", message["assistant"]
            continue
        name, content = ("from", "value") if "from" in message else ("role", "content")
        speaker = SPEAKERS.get(message[name]) if isinstance(message.get(name), str) else None
        if speaker is None or content not in message:
            raise ChatError("conversation_invalid")
        yield speaker, message[content]


class _Pictures:
    """Follows the markers and parts of a conversation, and collects the picture of each."""

    def __init__(self, images: list[bytes]):
        self._images, self._next, self._seen = images, 0, set()
        self.chosen: list[bytes] = []

    @property
    def has_unplaced(self) -> bool:
        return len(self._seen) < len(self._images)

    def text_of(self, content: Any) -> str:
        """Returns the text of a message, with a marker for each picture. Raises ChatError or ImageError."""
        if isinstance(content, str):
            for _ in range(content.count(MARKER)):
                self._take(self._next)
            return content
        if not isinstance(content, list):
            raise ChatError("conversation_invalid")
        text = ""
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                text += self.text_of(part["text"])
            elif kind in ("image", "image_url"):
                self._take_part(part)
                is_leading = not text.replace(f"{MARKER}\n", "")
                text += f"{MARKER}\n" if is_leading else MARKER
            else:
                raise ChatError("message_part_unknown")
        return text

    def _take_part(self, part: dict) -> None:
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if url is not None:
            self.chosen.append(picture_of_url(url))
        else:
            index = part.get("index")
            self._take(self._next if index is None else index)

    def _take(self, index: Any) -> None:
        if not isinstance(index, int) or not 0 <= index < len(self._images):
            raise ChatError("more_markers_than_images")
        self.chosen.append(self._images[index])
        self._seen.add(index)
        self._next = index + 1


def picture_of_url(url: Any) -> bytes:
    """Returns the picture of a data URL. Raises ImageError for any other, which would have to be fetched."""
    if not isinstance(url, str) or not url.startswith("data:") or ";base64," not in url:
        raise ImageError("image_is_a_url", "it would have to be fetched")
    picture = embedded_image(url.split(";base64,", 1)[1])
    if picture is None:
        raise ImageError("image_too_small", "width or height is 1")
    return picture
