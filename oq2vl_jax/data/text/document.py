"""What a sample is after tokenising."""

from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """One tokenised sample. tokens: int32 [n] with the image placeholder at visual tokens; is_labelled: bool [n], True
    where the token is something to predict; images: encoded bytes in order; key: where it came from."""

    tokens: np.ndarray
    is_labelled: np.ndarray
    images: list[bytes]
    key: str
