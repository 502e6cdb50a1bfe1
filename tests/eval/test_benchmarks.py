"""Reading each benchmark's files, the prompts of both profiles, and what damaged files get."""

import polars as pl
import pytest

from oq2vl_jax.errors import UserError
from oq2vl_jax.eval.benchmark import Item, Judgement
from oq2vl_jax.eval.benchmarks import TASKS, find_benchmark, mathvista, mmbench, mmmu, mmstar, pope
from oq2vl_jax.eval.evaluate import read_items
from oq2vl_jax.eval.tables import find_files, images_of, resolve_references
from tests.eval import benchmark_files as files

EIGHT = ("ai2d", "mathvista", "mmbench", "mmmu", "mmstar", "pope", "seedbench", "textvqa")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    return {"tsv": files.write_tsv_files(root / "tsv"), "parquet": files.write_parquet_files(root / "parquet")}


def read(folder, task):
    return read_items(task, find_files(str(folder), task, find_benchmark(task).files))


def test_every_module_of_the_folder_is_a_task_under_its_own_name():
    assert {*EIGHT, "easy_vqa"} <= set(TASKS)
    assert [find_benchmark(name).name for name in TASKS] == list(TASKS)


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
@pytest.mark.parametrize("task", EIGHT)
def test_both_distributions_are_read_with_their_pictures(folders, kind, task):
    items = read(folders[kind], task)
    assert items
    photos = {files.photo(name) for name in files.PHOTOS}
    for item in items:
        assert item.images
        assert set(item.images) <= photos
        for profile in ("official", "open_qwen2vl"):
            prompt = find_benchmark(task).prompt(item, profile)
            assert prompt.text.count("<image>") == len(item.images), prompt.text
            assert "<image 1>" not in prompt.text


def test_mmbench_rotations_share_one_picture_and_must_all_be_right(folders):
    items = read(folders["tsv"], "mmbench")
    assert len(items) == 16
    assert len({item.images[0] for item in items}) == 4
    right = [Judgement(1.0, "A")] * 16
    assert [score for _, score in mmbench.combine(items, right, "official")] == [1.0] * 4
    one_wrong = [Judgement(0.0, "B"), *right[1:]]
    assert [score for _, score in mmbench.combine(items, one_wrong, "official")] == [0.0, 1.0, 1.0, 1.0]
    assert sum(score for _, score in mmbench.combine(items, one_wrong, "open_qwen2vl")) == 15


def test_prompts_are_written_as_documented(folders):
    mmbench_item = read(folders["parquet"], "mmbench")[4]
    assert find_benchmark("mmbench").prompt(mmbench_item, "official").text == (
        "<image>\nLook closely.\nWhat is it?\nA. a cat\nB. a rocket\nC. an astronaut\nD. a cup\n"
        "Answer with the option's letter from the given choices directly."
    )
    raw = find_benchmark("mmbench").prompt(mmbench_item, "open_qwen2vl")
    assert raw.text == (
        "<image>\nWhat is it?\nA. a cat\nB. a rocket\nC. an astronaut\nD. a cup\n"
        "Answer with the option's letter from the given choices directly.\nAnswer:"
    )
    assert (raw.is_raw, raw.max_new_tokens, raw.stop) == (True, 16, (".", ",", "\n"))
    vista = read(folders["parquet"], "mathvista")[1]
    assert find_benchmark("mathvista").prompt(vista, "official").text == (
        "<image>\nHow wide? (Unit: cm)\nAnswer the question using a single floating-point number with 1 decimal places."
    )
    star = find_benchmark("mmstar").prompt(read(folders["parquet"], "mmstar")[0], "open_qwen2vl").text
    assert star.startswith("<image>\nQuestion: What is it?\nOptions: A: a cat")


def test_mmmu_pictures_stand_where_the_text_names_them(folders):
    for kind in ("tsv", "parquet"):
        item = read(folders[kind], "mmmu")[0]
        assert item.question == "Which is <image> beside <image>?"
        assert item.images[:2] == [files.photo("rocket"), files.photo("coffee")]
    assert len(read(folders["tsv"], "mmmu")) == 2, "dev rows are left out"
    assert read(folders["tsv"], "mmmu")[0].choices["B"] == "two <image>"


def test_an_open_mmmu_question_has_no_choices_and_a_list_of_answers(folders):
    chosen, opened = read(folders["parquet"], "mmmu")
    assert (chosen.answer, list(chosen.choices)) == ("B", ["A", "B"])
    assert (opened.answer, opened.choices) == (["1"], {})


def test_mmmu_pictures_without_a_place_in_the_text_are_not_placed():
    choices = {"A": "left", "B": "right"}
    assert mmmu.place_images("Which side?", choices, [b"1", b"2"]) == ("Which side?", [b"1", b"2"], False)
    assert mmmu.place_images("Is <image 1> left?", choices, []) == ("Is  left?", [], False)


def test_a_precision_of_mathvista_is_its_number_of_places():
    assert [mathvista.number_of_places({"precision": p}) for p in ("0.0", 2.0, None)] == [0, 2, 2]


def test_the_published_harness_fills_mmmus_places_in_the_order_of_the_pictures():
    pictures = [b"1", b"2", b"3"]
    question, images, is_placed = mmmu.place_images(
        "Is <image 2> or <image 1>?", choices := {"A": "<image 2>"}, pictures
    )
    assert (images, is_placed) == ([b"2", b"1", b"2"], True)
    facts = {"has_placed_pictures": True, "numbered": pictures[:2], "subfield": "Art_Theory"}
    asked = mmmu.prompt(Item("a", question, images, "A", choices, facts), "open_qwen2vl")
    assert asked.text == (
        "The following are multiple choice questions about  Art Theory.\n\nIs <image>\n or <image>\n?\nA. <image>\n\n"
        "Answer with the option's letter from the given choices directly.\nAnswer:"
    )
    assert asked.images == (b"1", b"2", b"1"), "two pictures, three places"


def test_an_mmmu_reply_that_names_nothing_gets_the_same_random_letter_every_time():
    item = Item("validation_Art_1", "?", [b""], "A", {"A": "x", "B": "y", "C": "z", "D": "w"})
    judged = [mmmu.judge(item, "I cannot tell", "official") for _ in range(3)]
    assert judged[0].parsed is None
    assert len(set(judged)) == 1


@pytest.mark.parametrize(
    ("kind", "answer", "precision", "reply", "is_right"),
    [
        ("integer", "12", 0, "12", True),
        ("integer", "12", 0, "The answer is 12 cm.", True),
        ("integer", "1200", 0, "1,200", True),
        ("integer", "12", 0, "12.5", False),
        ("integer", "12", 0, "", False),
        ("integer", "12", 0, "twelve", False),
        ("float", "1.5", 1, "1.52 m", True),
        ("float", "1.50", 2, "1.5", True),
        ("float", "1.5", 1, "1.58", False),
        ("list", "[1, 2]", 0, "[1,2]", True),
    ],
)
def test_mathvista_numbers_follow_type_and_precision(kind, answer, precision, reply, is_right):
    item = Item("0", "?", [b""], answer, {}, {"answer_type": kind, "precision": precision})
    assert bool(mathvista.judge(item, reply, "official").score) == is_right


def rewrite(folder, name, change):
    frame = pl.read_parquet(folder / name)
    (folder / name).unlink()
    change(frame).write_parquet(folder / name)


@pytest.mark.parametrize(
    ("task", "name", "change", "message"),
    [
        ("pope", "POPE/data/test-00000-of-00001.parquet", lambda f: f.drop("answer"),
         "column answer is missing for pope; expected id, question, answer, image, found category, id"),
        ("pope", "POPE/data/test-00000-of-00001.parquet", lambda f: f.with_columns(answer=pl.lit("maybe")),
         "the answer is 'maybe'; expected yes or no"),
        ("mmstar", "MMStar/val-00000-of-00001.parquet", lambda f: f.with_columns(answer=pl.lit("E")),
         "the answer is 'E', the options are A, B, C, D"),
        ("ai2d", "ai2d/data/test-00000-of-00001.parquet", lambda f: f.with_columns(answer=pl.lit("B")),
         "expected the number of an option"),
        ("ai2d", "ai2d/data/test-00000-of-00001.parquet", lambda f: f.with_columns(options=pl.lit(None)),
         "a cell holds a value of another kind than expected"),
        ("mmbench", "MMBench/en/dev-00000-of-00001.parquet", lambda f: f.with_columns(index=pl.lit("first")),
         "a cell holds a value of another kind than expected"),
        ("seedbench", "SEED-Bench/data/test-00000-of-00001.parquet",
         lambda f: f.with_columns(data_type=pl.lit("video")), "has no questions of this benchmark"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path, task, name, change, message):
    files.write_parquet_files(tmp_path)
    rewrite(tmp_path, name, change)
    with pytest.raises(UserError, match=message):
        read(tmp_path, task)


@pytest.mark.parametrize(
    ("task", "name", "change", "message"),
    [
        ("mmstar", "MMStar/val-00000-of-00001.parquet", lambda f: f.with_columns(index=pl.lit(3)), "earlier row"),
        ("mathvista", "MathVista/data/testmini-00000-of-00001.parquet",
         lambda f: f.with_columns(answer=pl.lit("7")), "'7'"),
        ("ai2d", "ai2d/data/test-00000-of-00001.parquet",
         lambda f: f.with_columns(answer=pl.when(pl.arange(pl.len()) == 1).then(pl.lit("B")).otherwise("answer")),
         "expected the number of an option"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_the_others_are_asked(tmp_path, task, name, change, message):
    files.write_parquet_files(tmp_path)
    whole = read(tmp_path, task)
    rewrite(tmp_path, name, change)
    items = read(tmp_path, task)
    assert len(items) == len(whole)
    assert any(message in (item.problem or "") for item in items)
    assert any(item.problem is None for item in items)


def test_damaged_and_missing_files_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no file of pope here; looked for POPE\.tsv"):
        read(tmp_path, "pope")
    (tmp_path / "POPE.tsv").write_text("index\tquestion\tanswer\timage\n1\tIs it?\n")
    with pytest.raises(UserError, match=r"POPE\.tsv: record 1 has another number of cells than the header"):
        read(tmp_path, "pope")
    (tmp_path / "POPE.tsv").write_text("index\tquestion\tanswer\timage\n1\tIs it?\tYes\taGk")
    with pytest.raises(UserError, match="does not end in a line break; fetch it again"):
        read(tmp_path, "pope")
    (tmp_path / "POPE.tsv").write_text("index\tquestion\tanswer\timage\n1\tIs it?\tYes\t7\n")
    with pytest.raises(UserError, match="row 1: its image is that of row 7, which holds none"):
        read(tmp_path, "pope")
    (tmp_path / "POPE.tsv").unlink()
    (tmp_path / "pope.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path, "pope")


def test_a_cell_that_is_no_picture_is_an_image_that_does_not_decode():
    assert images_of("!!") == [b""]
    assert images_of(None) == []
    assert images_of("['!!', 'aGk=']") == [b"", b"hi"]


def test_options_in_a_question_of_mmstar_are_cut_at_the_next_letter():
    question = "Which is it?\nOptions: A: a cat, B: two, dogs , C: 3: or so, D: none: of them"
    assert mmstar.options_in(question) == {"A": "a cat", "B": "two, dogs", "C": "3: or so", "D": "none: of them"}
    assert mmstar.options_in("A: a, B: b, C: c") == dict.fromkeys("ABCD", "\0")


def test_an_image_of_up_to_64_characters_is_the_index_of_another_row():
    rows = [{"index": "a", "image": "b"}, {"index": "b", "image": 65 * "x"}]
    assert [row["image"] for row in resolve_references(rows)] == [65 * "x", 65 * "x"]
    rows = [{"index": "a", "image": "b"}, {"index": "b", "image": 64 * "x"}]
    with pytest.raises(UserError, match="row a: its image is that of row b, which holds none"):
        resolve_references(rows)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("yes", "yes")], (1.0, 1.0, 1.0, 1.0)),
        ([("no", "no")], (0.0, 0.0, 0.0, 0.0)),
        ([("yes", "yes"), ("yes", None), ("no", "yes"), ("no", "no")], (0.5, 0.5, 0.5, 0.5)),
        ([("yes", "no"), ("no", "yes")], (0.0, 0.0, 0.0, 0.5)),
    ],
)
def test_pope_s_rates_by_hand(pairs, expected):
    """(answer, said): precision, recall, F1 and the share of yes."""
    judged = [(Item("0", "", [], answer), Judgement(float(said == answer), said)) for answer, said in pairs]
    assert tuple(pope.rates(judged).values()) == expected
