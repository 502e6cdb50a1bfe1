"""Turns Samples into Documents: tokenizer, special tokens, templates, and the loss mask (is_labelled).

Captions and interleaved documents have one form each:
  interleaved   <s>, then <image>\\n or text <|endofchunk|> per element, <|im_end|>
  caption       <s> <image>\\n caption <|im_end|>                   everything but the image labelled
Conversations are written by templates.py, and labelled on assistant turns only.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.bpe import BYTE_OF_CHARACTER
from oq2vl_jax.data.text.document import Document
from oq2vl_jax.data.text.templates import (
    CHAT_TEMPLATES,
    DEFAULT_SYSTEM,
    IMAGE,
    SpecialTokens,
    Turn,
    published_items,
    split_at_images,
    without_tokens_after_images,
)
from oq2vl_jax.data.text.tokenizer import BOS, END_OF_CHUNK, EOS, IMAGE_PAD, PAD, TURN_START, load_tokenizer
from oq2vl_jax.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
IMAGE_IN_TEXT = "<image-placeholder>"
"""Replaces a literal <image> in captions and interleaved documents, as in the published code."""
HUMAN, ASSISTANT, SYSTEM = "human", "gpt", "system"


class SampleError(ValueError):
    """A sample that cannot become a document. `reason` is the name it is counted under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class TextCodec:
    """A tokenizer with this project's special tokens; writes documents and prompts, and decodes tokens."""

    def __init__(self, backend: Any, where: str, save: Callable[[Path], None]):
        """backend: a tokenizers.Tokenizer. where: names it in messages. save: writes its files to a folder."""
        self._backend, self._save = backend, save
        self._backend.encode_special_tokens = True  # text that spells a special token stays text
        ids = {name: self._backend.token_to_id(name) for name in (BOS, EOS, PAD, END_OF_CHUNK, TURN_START, IMAGE_PAD)}
        missing = [name for name, token in ids.items() if token is None]
        if missing:
            raise UserError(f"{where}: the tokenizer lacks {', '.join(missing)}; Qwen2.5's has all but <|endofchunk|>.")
        self.special = SpecialTokens(*ids.values())
        self._added_tokens = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)

    @staticmethod
    def load(folder: str) -> "TextCodec":
        """Loads a tokenizer folder, without transformers if its tokenizer.json declares this project's tokens, as a
        checkpoint's does: seconds faster. Raises UserError."""
        import tokenizers

        file = Path(folder) / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
        except Exception:  # the Rust library raises a plain Exception; from_transformers names the problem
            backend = None
        if backend is not None:
            declared = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
            if {END_OF_CHUNK, BOS, IMAGE_PAD} <= declared:
                return TextCodec(backend, folder, partial(copy_tokenizer, Path(folder)))
        return TextCodec.from_transformers(folder)

    @staticmethod
    def from_transformers(folder: str) -> "TextCodec":
        """Loads any Hugging Face tokenizer folder, and declares what load looks for. Raises UserError."""
        tokenizer = load_tokenizer(folder)
        return TextCodec(tokenizer.backend_tokenizer, folder, tokenizer.save_pretrained)

    @staticmethod
    def from_saved(tokenizer_json: str, where: str) -> "TextCodec":
        """Builds the codec from the text of a tokenizer.json that `save` wrote; it has no other files to save."""
        import tokenizers

        return TextCodec(tokenizers.Tokenizer.from_str(tokenizer_json), where, already_saved)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. Raises SampleError for lone surrogates, which JSON can spell and UTF-8 cannot."""
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise SampleError("text_not_utf8") from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=True)

    def decode_exact(self, tokens: list[int]) -> str:
        """Decodes tokens to text that includes the special tokens."""
        return self._backend.decode(tokens, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one token, which can be part of a character; empty for an id without a token."""
        name = self._backend.id_to_token(token) or ""
        if name in self._added_tokens:
            return name.encode()
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in name)
        except KeyError:  # a vocabulary that is not byte-level
            return name.encode()

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files to an existing folder."""
        self._save(folder)

    def document(self, sample: Sample, template: str, num_visual_tokens: int) -> Document:
        """Tokenises a sample. Raises SampleError if it does not fit the template."""
        if sample.problem:
            raise SampleError(sample.problem)
        if sample.text is not None:
            turns = [self._caption_turn(sample.text)]
        elif sample.elements is not None:
            turns = [self._interleaved_turn(sample.elements)]
        else:
            turns = self._conversation_turns(sample.conversations, template)
        if sum(turn.count(None) for turn, _ in turns) != len(sample.images):
            raise SampleError("image_count_mismatch")
        tokens, is_labelled = [], []
        for turn, turn_labelled in turns:
            for token in turn:
                tokens += [self.special.image] * num_visual_tokens if token is None else [token]
                is_labelled += [False] * num_visual_tokens if token is None else [turn_labelled]
        return Document(np.array(tokens, np.int32), np.array(is_labelled, bool), sample.images, sample.key)

    def interleaved_parts(
        self, sample: Sample, num_visual_tokens: int, num_tokens: int, max_images: int
    ) -> list[Document]:
        """Tokenises an interleaved document into parts of at most num_tokens and max_images, one if it fits.

        It is cut before a picture or a text; a text longer than a row is cut between two tokens. The parts' tokens are
        the document's, but every part begins with <s> and ends with <|im_end|>. Raises SampleError.
        """
        if sample.problem:
            raise SampleError(sample.problem)
        assert sample.elements is not None
        if sample.elements.count(None) != len(sample.images):
            raise SampleError("image_count_mismatch")
        parts: list[list[int | None]] = []
        room_tokens = room_images = 0
        for unit in self._interleaved_units(sample.elements):
            start = 0
            while start < len(unit):
                is_image = unit[start] is None
                rest = len(unit) - start + (num_visual_tokens - 1) * is_image
                fits = rest <= room_tokens and is_image <= room_images
                if not fits and (not parts or parts[-1]):
                    parts.append([])
                    room_tokens, room_images = num_tokens - 2, max_images
                    continue
                size = min(len(unit) - start, room_tokens - (num_visual_tokens - 1) * is_image)
                parts[-1] += unit[start : start + size]
                room_tokens -= size + (num_visual_tokens - 1) * is_image
                room_images -= is_image
                start += size
        images, documents = iter(sample.images), []
        for i, part in enumerate(parts or [[]]):
            tokens = self._with_visual_tokens([self.special.bos, *part, self.special.eos], num_visual_tokens)
            own = [next(images) for token in part if token is None]
            array = np.array(tokens, np.int32)
            key = sample.key if len(parts) == 1 else f"{sample.key}~{i + 1}"
            documents.append(Document(array, array != self.special.image, own, key))
        return documents

    def _interleaved_units(self, elements: list[str | None]) -> "list[Turn]":
        """Returns the tokens of a document in runs that stay together: a picture with the text behind it, or a text."""
        units: list[list[str | int | None]] = []
        for i, text in enumerate(elements):
            if text is None:
                units.append([None, "\n"])
                continue
            items = [text.replace(IMAGE, IMAGE_IN_TEXT), self.special.end_of_chunk]
            if i and elements[i - 1] is None:
                units[-1] += items
            else:
                units.append(items)
        return [self._encode_items(items) for items in units]

    def prompt(self, turns: list[str], template: str, num_visual_tokens: int, system: str | None = None) -> list[int]:
        """Returns the tokens to generate from: a conversation, human first and last, and the header of the answer.

        Image placeholders replace <image> in the turns. A plain prompt is <s> and the texts. Raises SampleError.
        """
        if template == "plain":
            texts = [system or "", *(turn.strip() for turn in turns)]
            pieces = [piece for text in texts for piece in split_at_images(text)]
            encoded = self._encode_items([self.special.bos, *pieces])
        else:
            encoded = []
            for i, text in enumerate(turns):
                if i % 2:
                    encoded += [token for turn, _ in self._assistant_turns(text.strip(), template) for token in turn]
                else:
                    encoded += self._human_turn(text.strip(), template, i == 0, system)
        return self._with_visual_tokens(encoded, num_visual_tokens)

    def published_prompt(self, turns: list[str], num_visual_tokens: int, system: str | None = None) -> list[int]:
        """Returns the prompt of the published code (get_prompt, generate_batch): the conversation of open_qwen2vl,
        human first and last. The text between two images is tokenised in one piece, blanks at the end are removed, the
        token after every image is dropped, and a second <s> is put in front. Raises SampleError.
        """
        tokens = self._encode_items(published_items(self.special, turns, system or DEFAULT_SYSTEM))
        kept = without_tokens_after_images(tokens)
        return [self.special.bos, *self._with_visual_tokens(kept, num_visual_tokens)]

    def _with_visual_tokens(self, turn: "Turn", num_visual_tokens: int) -> list[int]:
        runs = [[self.special.image] * num_visual_tokens if token is None else [token] for token in turn]
        return [token for run in runs for token in run]

    def text_notes(self, sample: Sample) -> list[str]:
        """Returns notes for text that spells an image marker or a special token without meaning one."""
        texts = [sample.text or "", *(text or "" for text in sample.elements or ())]
        notes = ["image_marker_in_text"] if any(IMAGE in text for text in texts) else []
        if isinstance(sample.conversations, list):
            texts += [str(message["value"]) for message in sample.conversations]
        spells_special = any("<|" in text or BOS in text for text in texts) and any(
            name in text for text in texts for name in self._added_tokens
        )
        return notes + (["special_token_in_text"] if spells_special else [])

    def _interleaved_turn(self, elements: list[str | None]) -> "tuple[Turn, bool]":
        items: list[str | int | None] = [self.special.bos]
        for text in elements:
            if text is None:
                items += [None, "\n"]
            else:
                items += [text.replace(IMAGE, IMAGE_IN_TEXT), self.special.end_of_chunk]
        return self._encode_items([*items, self.special.eos]), True

    def _caption_turn(self, caption: str) -> "tuple[Turn, bool]":
        caption = caption.strip().replace(IMAGE, IMAGE_IN_TEXT)
        if not caption:
            raise SampleError("text_empty")
        return self._encode_items([self.special.bos, None, f"\n{caption}", self.special.eos]), True

    def _conversation_turns(self, conversations: Any, template: str) -> "list[tuple[Turn, bool]]":
        if template == "plain":
            raise SampleError("conversation_needs_a_template")
        if not isinstance(conversations, list) or len(conversations) < 2:
            raise SampleError("conversation_invalid")
        turns, system = [], None
        if isinstance(conversations[0], dict) and conversations[0].get("from") == SYSTEM:
            system, conversations = conversations[0].get("value"), conversations[1:]
        for i, message in enumerate(conversations):
            speaker = HUMAN if i % 2 == 0 else ASSISTANT
            if i == 0 and isinstance(message, dict) and message.get("from") == ASSISTANT:
                raise SampleError("conversation_starts_with_assistant")
            if not isinstance(message, dict) or message.get("from") != speaker:
                raise SampleError("conversation_invalid")
            if not isinstance(message.get("value"), str):
                raise SampleError("conversation_invalid")
            text = message["value"].strip()
            if speaker == HUMAN:
                turns.append((self._human_turn(text, template, i == 0, system), False))
            else:
                turns += self._assistant_turns(text, template)
        return turns

    def _human_turn(self, text: str, template: str, is_first: bool, system: str | None = None) -> "Turn":
        chat = CHAT_TEMPLATES[template]
        turn = self._encode_items(chat.human(self.special, text, is_first, system or DEFAULT_SYSTEM))
        return without_tokens_after_images(turn) if is_first and chat.drops_tokens_after_images else turn

    def _assistant_turns(self, text: str, template: str) -> "list[tuple[Turn, bool]]":
        parts = CHAT_TEMPLATES[template].assistant(self.special, text)
        return [(self._encode_items(items), is_labelled) for items, is_labelled in parts]

    def _encode_items(self, items: "list[str | int | None]") -> "Turn":
        """Turns text, special ids and images (None) into tokens; neighbouring texts are tokenised as one."""
        turn: Turn = []
        text = ""
        for item in [*items, None]:
            if isinstance(item, str):
                text += item
                continue
            turn += self.encode(text) if text else []
            text = ""
            turn.append(item)
        return turn[:-1]


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def already_saved(folder: Path) -> None:
    raise AssertionError(f"{folder}: a codec of from_saved has no files of its own")
