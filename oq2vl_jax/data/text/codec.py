"""Turns Samples into Documents: tokenizer, special tokens, templates, and the loss mask (is_labelled).

Captions and interleaved documents have one form, conversations four templates (arXiv 2504.00595 and its code):
  interleaved   <s>, then <image>\\n or text <|endofchunk|> per element, <|im_end|>
  plain         <s> <image>\\n caption <|im_end|>                            everything but the image labelled
  open_qwen2vl  the published tuning template, exactly: no newline before "assistant", and in the first turn the token
                after an image is dropped (a rule meant for Llama that fires because the turn begins with <s>)
  open_qwen2vl_released   very likely the template of the released instruct weights, inferred from that code's history:
                the images of the first turn precede everything, no newline before an answer
  chatml        Qwen2.5's own template
Conversations are labelled on assistant turns only.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.data.text.bpe import BYTE_OF_CHARACTER
from oq2vl_jax.data.text.document import Document
from oq2vl_jax.data.text.tokenizer import BOS, END_OF_CHUNK, EOS, IMAGE_PAD, PAD, TURN_START, load_tokenizer
from oq2vl_jax.errors import UserError

IMAGE = "<image>"
"""Marks the place of an image in the text of a conversation."""
TOKENIZER_SUFFIXES = (".json", ".txt", ".jinja")
IMAGE_IN_TEXT = "<image-placeholder>"
"""Replaces a literal <image> in captions and interleaved documents, as in the published code."""
HUMAN, ASSISTANT = "human", "gpt"
DEFAULT_SYSTEM = "You are a helpful assistant."


class SampleError(ValueError):
    """A sample that cannot become a document. `reason` is the name it is counted under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class SpecialTokens(NamedTuple):
    bos: int
    eos: int
    pad: int
    end_of_chunk: int
    turn_start: int
    image: int


class TextCodec:
    """A tokenizer with this project's special tokens; it encodes documents and prompts, and decodes tokens."""

    _tokenizer: Any = None
    """The tokenizer of transformers, if it was needed to load the folder."""
    _folder: Path | None = None
    """The folder of the files, if `load` did not need transformers."""

    def __init__(self, folder: str):
        """Loads a Hugging Face tokenizer folder and declares this project's special tokens. Raises UserError."""
        self._tokenizer = load_tokenizer(folder)
        self._prepare(self._tokenizer.backend_tokenizer, folder)

    @staticmethod
    def load(folder: str) -> "TextCodec":
        """Returns TextCodec(folder), seconds faster if every token is declared, as in a checkpoint's tokenizer."""
        import tokenizers

        file = Path(folder) / "tokenizer.json"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception:  # TextCodec(folder) reports the problem
                return TextCodec(folder)
            declared = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
            if {END_OF_CHUNK, BOS, IMAGE_PAD} <= declared:
                codec = TextCodec.__new__(TextCodec)
                codec._folder = Path(folder)
                codec._prepare(backend, folder)
                return codec
        return TextCodec(folder)

    @staticmethod
    def from_saved(tokenizer_json: str, where: str) -> "TextCodec":
        """Returns the codec whose `save` wrote this tokenizer.json, a second faster than importing transformers."""
        import tokenizers

        codec = TextCodec.__new__(TextCodec)
        codec._prepare(tokenizers.Tokenizer.from_str(tokenizer_json), where)
        return codec

    def _prepare(self, backend: Any, where: str) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True  # text that spells a special token stays text
        ids = {name: self._backend.token_to_id(name) for name in (BOS, EOS, PAD, END_OF_CHUNK, TURN_START, IMAGE_PAD)}
        missing = [name for name, token in ids.items() if token is None]
        if missing:
            raise UserError(f"{where}: the tokenizer lacks {', '.join(missing)}; Qwen2.5's has all but <|endofchunk|>.")
        self.special = SpecialTokens(*ids.values())
        self._added_tokens = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)

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
        """Writes the files of the tokenizer to an existing folder."""
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
            return
        assert self._folder is not None, "from_saved codecs have been saved"
        for file in self._folder.iterdir():
            if file.suffix in TOKENIZER_SUFFIXES:
                shutil.copyfile(file, folder / file.name)

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
                    encoded += self._human_turn(text.strip(), template, i == 0, system or DEFAULT_SYSTEM)
        runs = [[self.special.image] * num_visual_tokens if token is None else [token] for token in encoded]
        return [token for run in runs for token in run]

    def published_prompt(self, turns: list[str], num_visual_tokens: int, system: str | None = None) -> list[int]:
        """Returns the prompt of the published code (get_prompt, generate_batch): the conversation of open_qwen2vl,
        human first and last. The text between two images is tokenised in one piece, blanks at the end are removed, the
        token after every image is dropped, and a second <s> is put in front. Raises SampleError.
        """
        special = self.special
        items: list[str | int | None] = [special.bos, special.turn_start, f"system\n{system or DEFAULT_SYSTEM}"]
        items += [special.eos, "\n"]
        for i, text in enumerate(turns):
            pieces = split_at_images(text.strip())
            if i % 2:
                items += [*(pieces if text.strip() else [" "]), special.eos, "\n"]
            else:
                items += [special.turn_start, "user\n", *pieces, special.eos]
                items.append("assistant\n" if i < len(turns) - 1 else "assistant")
        tokens = self._encode_items(items)
        kept = [token for i, token in enumerate(tokens) if i == 0 or token is None or tokens[i - 1] is not None]
        runs = [[special.image] * num_visual_tokens if token is None else [token] for token in kept]
        return [special.bos, *(token for run in runs for token in run)]

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
        turns = []
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
                turns.append((self._human_turn(text, template, is_first=i == 0), False))
            else:
                turns += self._assistant_turns(text, template)
        return turns

    def _human_turn(self, text: str, template: str, is_first: bool, system: str = DEFAULT_SYSTEM) -> "Turn":
        turn_start, eos = self.special.turn_start, self.special.eos
        header = [turn_start, f"system\n{system}", eos, "\n"] if is_first else []
        if template == "open_qwen2vl_released" and is_first:
            images, text = [None, "\n"] * text.count(IMAGE), text.replace(IMAGE, "")
            return self._encode_items(
                [*images, self.special.bos, *header, turn_start, f"user\n{text}", eos, "assistant"]
            )
        message = [turn_start, "user\n", *split_at_images(text), eos]
        if template == "chatml":
            return self._encode_items([*header, *message, "\n", turn_start, "assistant\n"])
        if template == "open_qwen2vl_released":
            return self._encode_items([*message, "assistant"])
        if not is_first:
            return self._encode_items([*message, "assistant\n"])
        turn = self._encode_items([self.special.bos, *header, *message, "assistant\n"])
        return [token for i, token in enumerate(turn) if i == 0 or token is None or turn[i - 1] is not None]

    def _assistant_turns(self, text: str, template: str) -> "list[tuple[Turn, bool]]":
        if template == "chatml":
            return [
                (self._encode_items([*split_at_images(text), self.special.eos]), True),
                (self._encode_items(["\n"]), False),
            ]
        return [(self._encode_items([*split_at_images(text or " "), self.special.eos, "\n"]), True)]

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


Turn = list[int | None]
"""Token ids, with None for an image."""


def split_at_images(text: str) -> list[str | None]:
    """Splits 'a<image>b' into ['a', None, 'b']."""
    pieces = text.split(IMAGE)
    return [item for piece in pieces for item in (None, piece)][1:]
