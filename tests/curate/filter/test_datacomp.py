"""Uid for uid what DataComp's own filters keep (mlfoundations/datacomp, baselines/apply_filter.py), on odd rows.

Their rules, row by row in Python and numpy; sets of ids are intersected and united as their code does.
"""

import random

import numpy as np
import polars as pl
import pytest

from oq2vl_jax.curate.filter.run import FilterCommand, run_filter
from oq2vl_jax.data.text.language import language_model

COUNT = 20_000
WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "old",
    "harbour",
    "in",
    "evening",
    "ein",
    "altes",
    "Haus",
    "am",
    "Hafen",
    "x",
    "猫",
    "123",
)
BLANKS = (
    " ",
    " ",
    " ",
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\r",
    "\x0b",
    "\x1c",
    "\x1f",
    "\x85",
    "\xa0",
    "\u2003",
    "\u200b",
    "",
)
KEYS = {"l14": "clip_l14_similarity_score", "b32": "clip_b32_similarity_score"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(folder, rows): texts parted by every kind of blank, scores rounded to float32 ties, one id in fifty twice."""
    rng = random.Random(1)
    found = []
    for i in range(COUNT):
        text = "".join(rng.choice(WORDS) + rng.choice(BLANKS) for _ in range(rng.randrange(0, 9)))
        uid = f"{rng.getrandbits(128):032x}" if i % 50 else found[rng.randrange(i)]["uid"] if i else "0" * 32
        found.append({
            "uid": uid, "text": text, "original_width": rng.choice((100, 199, 200, 201, 600, 603, 640)),
            "original_height": rng.choice((150, 200, 201, 480, 600)),
            KEYS["l14"]: np.float32(round(rng.gauss(0.21, 0.05), 2)), KEYS["b32"]: np.float32(rng.gauss(0.28, 0.05)),
        })  # fmt: skip
    folder = tmp_path_factory.mktemp("datacomp")
    schema = {"uid": pl.String, "text": pl.String, "original_width": pl.Int64, "original_height": pl.Int64}
    frame = pl.DataFrame(found, schema=schema | dict.fromkeys(KEYS.values(), pl.Float32))
    frame[:7000].write_parquet(folder / "0.parquet")
    frame[7000:].write_parquet(folder / "1.parquet")
    return folder, found


def run(folder, tmp_path, expression):
    """(report, kept ids)."""
    (tmp_path / "rules.toml").write_text(f"expression = '{expression}'\n")
    report = run_filter(FilterCommand(str(tmp_path / "rules.toml"), f"{folder}/*.parquet", str(tmp_path / "out")))
    stored = np.load(tmp_path / "out" / "uids.npy")
    return report, {f"{high:016x}{low:016x}" for high, low in stored.tolist()}


def their_basic(rows):
    model, kept = language_model(), set()
    for row in rows:
        text = row["text"]
        labels, _ = model.predict(text.replace("\n", " "))
        is_english = bool(labels) and labels[0].split("__label__")[1] == "en"
        sides = sorted((row["original_width"], row["original_height"]))
        is_large = sides[0] >= 200 and sides[1] / sides[0] <= 3.0
        if is_english and len(text.split()) > 2 and len(text) > 5 and is_large:
            kept.add(row["uid"])
    return kept


def their_threshold(rows, key, threshold):
    return {row["uid"] for row in rows if row[key] >= threshold}


def their_fraction(rows, key, fraction):
    values = np.array([row[key] for row in rows], np.float32)
    threshold = -np.sort(-values)[int(len(values) * fraction)]
    return {row["uid"] for row, is_kept in zip(rows, values >= threshold, strict=True) if is_kept}


def test_the_same_ids_as_theirs(rows, tmp_path):
    folder, found = rows
    basic = their_basic(found)
    expectations = {
        "basic": basic,
        "clip_l14(>= 0.21)": their_threshold(found, KEYS["l14"], 0.21),
        "clip_b32(>= 0.3)": their_threshold(found, KEYS["b32"], 0.3),
        **{f"clip_l14_top({f})": their_fraction(found, KEYS["l14"], f) for f in (0.3, 0.29, 0.1, 0.0001)},
        **{f"clip_b32_top({f})": their_fraction(found, KEYS["b32"], f) for f in (0.3, 0.29, 0.57, 0.99999)},
        "basic & clip_b32_top(0.3)": basic & their_fraction(found, KEYS["b32"], 0.3),
        "clip_l14(>= 0.25) & clip_b32(>= 0.3)": their_threshold(found, KEYS["l14"], 0.25)
        & their_threshold(found, KEYS["b32"], 0.3),
    }
    assert 500 < len(basic) < COUNT / 2
    for expression, expected in expectations.items():
        _, kept = run(folder, tmp_path, expression)
        assert kept == expected, (expression, len(kept), len(expected))


def test_exact_keeps_n(rows, tmp_path):
    """Of rows whose ids differ: a row is kept with its id, and two of one id count twice."""
    frame = pl.concat([pl.read_parquet(rows[0] / name) for name in ("0.parquet", "1.parquet")]).unique("uid")
    frame.write_parquet(tmp_path / "once.parquet")
    for fraction in (0.3, 0.29, 0.0001):
        report, kept = run(tmp_path, tmp_path, f"clip_l14_top({fraction}, exact)")
        assert report["kept"] == len(kept) == int(fraction * len(frame) + 1e-9)
