"""Document: a tokenised sample."""

from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """One tokenised sample. tokens: int32 [n] with the image placeholder at visual tokens; is_labelled: bool [n], True
    for a token to predict (the loss mask); images: encoded bytes in order; key: the key of the sample."""

    tokens: np.ndarray
    is_labelled: np.ndarray
    images: list[bytes]
    key: str
