"""The filter command on made-up metadata, against row-by-row Python; its report and what bad input gets."""

import json
import random

import numpy as np
import polars as pl
import pytest

from oq2vl_jax.curate.filter.apply import over_uids
from oq2vl_jax.curate.filter.expression import Leaf
from oq2vl_jax.curate.filter.pool import Pool
from oq2vl_jax.curate.filter.run import FilterCommand, run_filter
from oq2vl_jax.data.text import language
from oq2vl_jax.errors import UserError
from tests.data.conftest import caption_sample

WORDS = ("photo", "of", "a", "red", "house", "x", "überall", "猫")
COUNT = 500


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """(folder, rows): two metadata files and one of scores, with holes; rows are dicts of everything."""
    rng = random.Random(0)
    rows = []
    for i in range(COUNT):
        text = None if i % 50 == 7 else "  ".join(rng.choice(WORDS) for _ in range(rng.randrange(0, 7)))
        row = {"uid": f"{rng.getrandbits(128):032x}", "text": text, "original_width": rng.randrange(1, 900),
               "original_height": rng.randrange(1, 900)}  # fmt: skip
        row["clip_l14_similarity_score"] = None if i % 41 == 0 else round(rng.gauss(0.25, 0.05), 2)
        row["semantic_understanding"] = None if i % 3 == 0 else rng.randrange(80, 88)
        rows.append(row)
    rows[3]["uid"], rows[4]["uid"] = "not hex", None
    rows[10]["uid"] = rows[11]["uid"]
    folder = tmp_path_factory.mktemp("pool")
    metadata = pl.DataFrame(rows, infer_schema_length=None).drop("semantic_understanding")
    metadata[:200].write_parquet(folder / "0.parquet")
    metadata[200:].write_parquet(folder / "1.parquet")
    (folder / "scores").mkdir()
    scored = [row for row in rows if row["semantic_understanding"] is not None and len(row["uid"] or "") == 32]
    rng.shuffle(scored)
    scores = pl.DataFrame([{k: row[k] for k in ("uid", "semantic_understanding")} for row in scored])
    scores.with_columns(pl.lit("scored").alias("status")).write_parquet(folder / "scores" / "0.parquet")
    return folder, rows


def run(folder, tmp_path, expression, toml="", **options):
    (tmp_path / "rules.toml").write_text(f"expression = '{expression}'\n{toml}")
    command = FilterCommand(str(tmp_path / "rules.toml"), f"{folder}/*.parquet", str(tmp_path / "out"),
                            (f"{folder}/scores/*.parquet",), **options)  # fmt: skip
    report = run_filter(command)
    stored = np.load(tmp_path / "out" / "uids.npy")
    return report, {f"{high:016x}{low:016x}" for high, low in stored.tolist()}


def is_basic(row):
    width, height = row["original_width"], row["original_height"]
    text = row["text"] or ""
    return (
        len(text.split()) >= 3
        and len(text) >= 6
        and min(width, height) >= 200
        and max(width, height) <= 3 * min(width, height)
    )


def clip_of(row, default):
    score = row["clip_l14_similarity_score"]
    return default if score is None else score


def uids_of(rows, keep):
    return {row["uid"] for row in rows if row["uid"] and len(row["uid"]) == 32 and keep(row)}


def at_least(row, column, threshold):
    return row[column] is not None and row[column] >= threshold


NO_LANGUAGE = "[basic]\nlanguage = ''\n"


def test_rules_and_their_combinations_keep_what_row_by_row_python_keeps(pool, tmp_path):
    folder, rows = pool
    np.save(tmp_path / "subset.npy", np.sort(np.array(
        [(int(row["uid"][:16], 16), int(row["uid"][16:], 16)) for row in rows[20:120]], "u8,u8")))  # fmt: skip
    subset = {row["uid"] for row in rows[20:120]}
    expectations = {
        "basic": is_basic,
        "words(>= 1)": lambda row: len((row["text"] or "").split()) >= 1,
        "words(>= 2)": lambda row: len((row["text"] or "").split()) >= 2,
        "words(< 2)": lambda row: row["text"] is not None and len(row["text"].split()) < 2,
        "clip_l14(>= 0.27)": lambda row: at_least(row, "clip_l14_similarity_score", 0.27),
        "clip_l14(< 0.2)": lambda row: (
            row["clip_l14_similarity_score"] is not None and row["clip_l14_similarity_score"] < 0.2
        ),
        "mlm(semantic_understanding >= 85)": lambda row: at_least(row, "semantic_understanding", 85),
        f"basic & mlm(semantic_understanding >= 85) | uids({tmp_path}/subset.npy)": lambda row: (
            (is_basic(row) and at_least(row, "semantic_understanding", 85)) or row["uid"] in subset
        ),
        f"uids({tmp_path}/subset.npy) - basic": lambda row: row["uid"] in subset and not is_basic(row),
    }
    for expression, keep in expectations.items():
        report, kept = run(folder, tmp_path, expression, NO_LANGUAGE)
        assert kept == uids_of(rows, keep), expression
        assert report["uids"] == len(kept)
        assert report["invalid_uids"] == 2


def test_a_top_fraction_keeps_everything_from_the_score_behind_the_nth_on(pool, tmp_path):
    folder, rows = pool
    valid = [row["clip_l14_similarity_score"] for row in rows if len(row["uid"] or "") == 32]
    scored = sorted((score for score in valid if score is not None), reverse=True)
    threshold = scored[int(len(rows) * 0.3)]
    report, kept = run(folder, tmp_path, "clip_l14_top(0.3)")
    assert kept == uids_of(rows, lambda row: at_least(row, "clip_l14_similarity_score", threshold))
    assert report["thresholds"]["clip_l14_similarity_score"]["clip_l14_top(0.3)"] == pytest.approx(threshold)


def test_an_exact_top_fraction_samples_its_ties_with_the_seed_and_not_with_the_order(pool, tmp_path):
    folder, rows = pool
    scored = [r for r in rows if r["semantic_understanding"] is not None and len(r["uid"] or "") == 32]
    count = int(0.2 * len(scored))
    kept = [run(folder, tmp_path, "mlm_top(semantic_understanding, 0.2)", f"seed = {seed}")[1] for seed in (0, 1, 0)]
    values = sorted((r["semantic_understanding"] for r in scored), reverse=True)
    above = {r["uid"] for r in scored if r["semantic_understanding"] > values[count - 1]}
    assert all(len(uids) == count and above <= uids for uids in kept)
    assert kept[0] == kept[2] != kept[1]
    other = tmp_path / "reversed"
    (other / "scores").mkdir(parents=True)
    for name in ("0.parquet", "1.parquet", "scores/0.parquet"):
        pl.read_parquet(folder / name).reverse().write_parquet(other / name)
    assert run(other, tmp_path, "mlm_top(semantic_understanding, 0.2)", "seed = 0")[1] == kept[0]


def test_the_language_rule_asks_fasttext(tmp_path):
    texts = ["a photograph of the old harbour in the evening light", "ein altes Haus am Hafen im Abendlicht", None, ""]
    frame = pl.DataFrame({"uid": [f"{i:032x}" for i in range(4)], "text": texts})
    (tmp_path / "meta").mkdir()
    frame.write_parquet(tmp_path / "meta" / "0.parquet")
    for expression, expected in (("language(en)", {0}), ("language(de, 0.5)", {1}), ("language(de, 1.0)", set())):
        (tmp_path / "rules.toml").write_text(f"expression = '{expression}'")
        run_filter(FilterCommand(str(tmp_path / "rules.toml"), f"{tmp_path}/meta/*.parquet", str(tmp_path / "out")))
        assert {low for _, low in np.load(tmp_path / "out" / "uids.npy").tolist()} == expected


def test_many_texts_are_tested_by_several_processes_in_their_order(monkeypatch):
    monkeypatch.setattr(language, "TEXTS_PER_TASK", 3)
    monkeypatch.setattr(language, "FEW_TEXTS", 4)
    texts = ["a view of the old harbour", "ein altes Haus am Hafen", "", "the house of my brother"] * 5
    with language.LanguageTest(2) as test:
        answers = test("en", 0.0, texts)
        assert test._pool is not None
    assert answers == language.are_language("en", 0.0, texts)
    assert answers[:4] == [True, False, False, True]


@pytest.mark.parametrize("num_halves", [3, 60, 2**40])
def test_a_rule_about_samples_keeps_an_id_if_it_keeps_one_of_its_rows(num_halves):
    rng = np.random.default_rng(num_halves)
    high, low = rng.integers(0, num_halves, 400, np.uint64), rng.integers(0, 4, 400, np.uint64)
    is_valid, keep = rng.random(400) < 0.9, rng.random(400) < 0.3
    pool = Pool(np.where(is_valid, high, 0), np.where(is_valid, low, 0), is_valid, {}, {}, {})
    shared = over_uids({Leaf("rule"): keep & is_valid}, pool)[Leaf("rule")]
    kept = {(high[i], low[i]) for i in np.flatnonzero(keep & is_valid)}
    assert shared.tolist() == [bool(is_valid[i] and (high[i], low[i]) in kept) for i in range(400)]


def test_the_report_counts_and_shows_pictures(pool, tmp_path, write_shard):
    folder, rows = pool
    shown = [i for i in range(30) if rows[i]["text"] and i not in (3, 4)]
    samples = [
        caption_sample(i, text=rows[i]["text"]) | {"json": json.dumps({"uid": rows[i]["uid"]}).encode()} for i in shown
    ]
    shard = write_shard(tmp_path / "0.tar", samples)
    expression = "clip_l14_top(0.5) & basic | mlm(semantic_understanding >= 85)"
    report, kept = run(folder, tmp_path, expression, NO_LANGUAGE, shards=shard, num_pictures=3)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    rules = report["rules"]
    assert rules["basic"]["true"] == len([row for row in rows if is_basic(row) and len(row["uid"] or "") == 32])
    both = "clip_l14_top(0.5) / mlm(semantic_understanding >= 85)"
    assert 0 < report["overlap"][both] <= rules["mlm(semantic_understanding >= 85)"]["true"]
    assert report["repeated_uids"] == report["kept"] - len(kept)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 6
    assert "Rejected: 3 at random" in page
    assert "not basic" in page
    assert page.count("<svg") == 2


def test_the_report_counts_what_each_rule_decides_alone(pool, tmp_path):
    folder, _ = pool
    expression = "clip_l14_top(0.5) & basic | mlm(semantic_understanding >= 85)"
    report = run(folder, tmp_path, expression, NO_LANGUAGE)[0]
    alone = {name: rule["decided_by_it_alone"] for name, rule in report["rules"].items()}
    assert (
        alone["mlm(semantic_understanding >= 85)"]
        == report["kept"] - run(folder, tmp_path, "clip_l14_top(0.5) & basic", NO_LANGUAGE)[0]["kept"]
    )
    assert alone["basic"] == alone["clip_l14_top(0.5)"] > 0
    left_out = run(folder, tmp_path, "basic - mlm(semantic_understanding >= 85)", NO_LANGUAGE)[0]
    without = run(folder, tmp_path, "basic", NO_LANGUAGE)[0]["kept"]
    name = "mlm(semantic_understanding >= 85)"
    assert left_out["rules"][name]["decided_by_it_alone"] == without - left_out["kept"] > 0


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("expression = 'basic", r"not valid TOML"),
        ("expresion = 'basic'", r"unknown key 'expresion' .did you mean 'expression'"),
        ("expression = 'basik'", r"no such rule \(did you mean 'basic'"),
        ("expression = 'top(nothing, 0.1)'", "no file has the column nothing"),
        ("expression = 'basic'\n[basic]\nmin_word = 3", r"min_word"),
        ("expression = 'basic(3)'", "takes no arguments"),
        ("expression = 'uids(nowhere.npy)'", r"nowhere\.npy: no such file"),
    ],
)
def test_mistakes_in_the_filter_file_are_explained(pool, tmp_path, toml, message):
    (tmp_path / "rules.toml").write_text(toml)
    command = FilterCommand(str(tmp_path / "rules.toml"), f"{pool[0]}/*.parquet", str(tmp_path / "out"),
                            (f"{pool[0]}/scores/*.parquet",))  # fmt: skip
    with pytest.raises(UserError, match=message):
        run_filter(command)
    assert not (tmp_path / "out" / "uids.npy").exists()


def test_metadata_that_does_not_fit_is_explained(tmp_path):
    (tmp_path / "rules.toml").write_text("expression = 'basic'")
    command = FilterCommand(str(tmp_path / "rules.toml"), f"{tmp_path}/*.parquet", str(tmp_path / "out"))
    (tmp_path / "0.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"0\.parquet: cannot be read as parquet"):
        run_filter(command)
    pl.DataFrame({"uid": ["0" * 32], "txt": ["a"]}).write_parquet(tmp_path / "0.parquet")
    with pytest.raises(UserError, match=r"no column text or caption \(did you mean|no column original_height"):
        run_filter(command)
    pl.DataFrame({"id": ["0" * 32], "text": ["a"]}).write_parquet(tmp_path / "0.parquet")
    with pytest.raises(UserError, match=r"no column"):
        run_filter(command)


def test_img2dataset_shards_without_uids_go_by_their_keys(tmp_path, write_shard):
    """From metadata with keys to tars: filter, then reshard."""
    from oq2vl_jax.curate.reshard import ReshardConfig, reshard
    from oq2vl_jax.data.samples.tars import read_members
    from oq2vl_jax.jobs import Execution

    keys = [f"{i:09d}" for i in range(20)]
    texts = ["a photograph of a house" if i % 3 else "house" for i in range(20)]
    pl.DataFrame({"key": keys, "caption": texts, "width": [300] * 20, "height": [300] * 20}).write_parquet(
        tmp_path / "0.parquet"
    )
    (tmp_path / "rules.toml").write_text("expression = 'basic'\n" + NO_LANGUAGE)
    run_filter(FilterCommand(str(tmp_path / "rules.toml"), f"{tmp_path}/*.parquet", str(tmp_path / "out")))
    samples = [{**caption_sample(i, text=texts[i]), "__key__": key} for i, key in enumerate(keys)]
    shard = write_shard(tmp_path / "0.tar", samples)
    reshard(ReshardConfig(shard, f"{tmp_path}/out/uids.npy", f"{tmp_path}/tars", execution=Execution(1)))
    kept = [members.key for members in read_members(str(tmp_path / "tars" / "00000000.tar"))]
    assert kept == [key for i, key in enumerate(keys) if i % 3]


def test_a_top_fraction_of_nothing_keeps_nothing_and_the_report_is_json(pool, tmp_path):
    report, kept = run(pool[0], tmp_path, "clip_l14_top(0.001, exact)")
    assert not kept
    json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["thresholds"] == {}


def test_a_cut_off_tar_is_no_reason_to_do_without_a_report(pool, tmp_path, write_shard):
    shard = tmp_path / "0.tar"
    write_shard(shard, [caption_sample(i) for i in range(5)])
    shard.write_bytes(shard.read_bytes()[:5000])
    report, _ = run(pool[0], tmp_path, "basic", NO_LANGUAGE, shards=str(shard))
    assert report["samples"] == COUNT


def test_unknown_sizes_pass_no_rule_about_them(tmp_path):
    sizes = [(None, 300), (300, None), (0, 0), (300, 300)]
    pl.DataFrame(
        {
            "uid": [f"{i:032x}" for i in range(4)],
            "original_width": [w for w, _ in sizes],
            "original_height": [h for _, h in sizes],
        }
    ).write_parquet(tmp_path / "0.parquet")
    for expression in ("short_side(>= 32)", "aspect(<= 1e20)", "aspect(>= 1)"):
        (tmp_path / "rules.toml").write_text(f"expression = '{expression}'")
        run_filter(FilterCommand(str(tmp_path / "rules.toml"), f"{tmp_path}/*.parquet", str(tmp_path / "out")))
        assert np.load(tmp_path / "out" / "uids.npy").tolist() == [(0, 3)]


def test_scores_that_belong_to_no_sample_are_an_error_and_not_an_empty_set(pool, tmp_path):
    folder, _ = pool
    (tmp_path / "rules.toml").write_text("expression = 'top(quality, 0.5)'\nseed = -1")
    for name, frame in {
        "other ids": pl.DataFrame({"uid": ["f" * 32], "quality": [1.0]}),
        "no numbers": pl.DataFrame({"uid": ["f" * 32], "quality": ["high"]}),
        "no rows": pl.DataFrame(schema={"uid": pl.String, "quality": pl.Float32}),
    }.items():
        frame.write_parquet(tmp_path / "scores.parquet")
        command = FilterCommand(
            str(tmp_path / "rules.toml"), f"{folder}/*.parquet", f"{tmp_path}/out", (f"{tmp_path}/scores.parquet",)
        )
        with pytest.raises(UserError, match="do the ids of the files match"):
            run_filter(command)
        assert not (tmp_path / "out").exists(), name


def test_a_negative_seed_and_infinite_scores_are_no_crash(pool, tmp_path):
    folder, rows = pool
    uids = [row["uid"] for row in rows if len(row["uid"] or "") == 32]
    quality = [float("inf")] * 3 + [1.0] * (len(uids) - 3)
    pl.DataFrame({"uid": uids, "quality": quality}).write_parquet(tmp_path / "scores.parquet")
    (tmp_path / "rules.toml").write_text("expression = 'top(quality, 0.5)'\nseed = -1")
    command = FilterCommand(
        str(tmp_path / "rules.toml"), f"{folder}/*.parquet", f"{tmp_path}/out", (f"{tmp_path}/scores.parquet",)
    )
    assert run_filter(command)["kept"] == len(uids) // 2


def test_several_scores_of_a_sample_are_counted(pool, tmp_path):
    """In one file and over two; equal ones, and those of samples that the metadata does not have, are no conflict."""
    folder, rows = pool
    ids = [row["uid"] for row in rows if len(row["uid"] or "") == 32][20:24]
    pl.DataFrame({"uid": [*ids, ids[0], ids[1]], "quality": [1.0, 2.0, 3.0, 4.0, 9.0, 2.0]}
                 ).write_parquet(tmp_path / "a.parquet")  # fmt: skip
    for i in range(64):  # past the files that are read together
        pl.DataFrame({"uid": ids[2:3] if i == 63 else ["f" * 32], "quality": [7.0]}).write_parquet(
            tmp_path / f"b{i:02d}.parquet"
        )
    (tmp_path / "rules.toml").write_text("expression = 'score(quality >= 5)'")
    command = FilterCommand(
        str(tmp_path / "rules.toml"), f"{folder}/*.parquet", f"{tmp_path}/out", (f"{tmp_path}/*.parquet",)
    )
    report = run_filter(command)
    assert report["conflicting_scores"] == {"quality": 2}
    assert report["kept"] == 0
