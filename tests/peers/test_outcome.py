"""What the comparison with peers says about a side that ends without figures, or has another version."""

import sys

import pytest

from tests.peers.compare_jax import ran
from tests.peers.outcome import TRIED, untried

CODE = {
    "raise MemoryError": "needs more memory than there is",
    "raise RuntimeError('RESOURCE_EXHAUSTED: 9 TB')": "needs more memory than there is",
    "import os; os.kill(os.getpid(), 9)": "was killed by the system",
    "import no_such_package": "the package no_such_package is not installed",
    "print('a few words')": "ended without figures, exit code 0",
    "raise SystemExit(3)": "ended without figures, exit code 3",
}


@pytest.mark.parametrize(("code", "sentence"), CODE.items())
def test_a_side_without_figures_is_one_sentence(code, sentence):
    assert sentence in ran([sys.executable, "-c", code])["failed"]


def test_a_python_that_is_not_there_is_one_sentence():
    assert "does not start" in ran(["/nowhere/python"])["failed"]


def test_words_that_are_not_understood_are_shown(capfd):
    ran([sys.executable, "-c", "raise KeyError('seventeen')"])
    assert "seventeen" in capfd.readouterr().err


def test_another_version_is_named():
    assert untried({**TRIED, "torch": TRIED["torch"] + "+cpu", "device": "cpu"}) == []
    (sentence,) = untried({**TRIED, "maxtext": "9.9"})
    assert "maxtext 9.9 is not the version" in sentence
