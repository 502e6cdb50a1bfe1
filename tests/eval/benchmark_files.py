"""Small files in the exact column layout of each benchmark, with real photographs from scikit-image.

Column facts: docs/evaluation.md. Every builder returns the folder it wrote to; answers are chosen by the test.
"""

import base64
import csv
import io
from functools import lru_cache
from pathlib import Path

import polars as pl

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


@lru_cache
def photo(name, side=96):
    """JPEG bytes of one of scikit-image's photographs."""
    import skimage.data
    from PIL import Image

    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def base64_photo(name):
    return base64.b64encode(photo(name)).decode()


def cell(name):
    """An image as a Hugging Face parquet file holds it."""
    return {"bytes": photo(name), "path": f"{name}.jpg"}


def write_parquet(folder, rows, name):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(path)


def write_tsv(folder, rows, name):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


OPTIONS = ("a cat", "a rocket", "an astronaut", "a cup")
ANSWER_OF = {"chelsea": "a cat", "rocket": "a rocket", "astronaut": "an astronaut", "coffee": "a cup"}


def rotations(name, base):
    """MMBench rows of one question: the options rotated, the index + k * 1,000,000; the image only in the first."""
    for k in range(4):
        options = OPTIONS[k:] + OPTIONS[:k]
        yield {
            "index": base + k * 1_000_000, "question": "What is it?", "hint": "Look closely." if base == 1 else None,
            **dict(zip("ABCD", options, strict=True)), "answer": "ABCD"[options.index(ANSWER_OF[name])],
            "category": "object_localization", "l2-category": "finegrained_perception", "split": "dev",
            "image": base64_photo(name) if k == 0 else str(base),
        }  # fmt: skip


def write_tsv_files(folder):
    """All eight, as VLMEvalKit distributes them."""
    write_tsv(folder, [r for i, p in enumerate(PHOTOS) for r in rotations(p, i)], "MMBench_DEV_EN.tsv")
    rows = [r for i, p in enumerate(PHOTOS) for r in rotations(p, i)][::4]
    write_tsv(folder, rows, "SEEDBench_IMG.tsv")
    write_tsv(folder, [{**r, "l2-category": "math"} for r in rows], "MMStar.tsv")
    write_tsv(folder, rows, "AI2D_TEST.tsv")
    pope = [
        {"index": i, "image": base64_photo(p), "question": f"Is there {text}?", "answer": "Yes" if k == 0 else "No",
         "category": "popular"}
        for i, (p, text, k) in enumerate((p, ANSWER_OF[q], int(p != q)) for p in PHOTOS for q in PHOTOS[:2])
    ]  # fmt: skip
    write_tsv(folder, pope, "POPE.tsv")
    text_vqa = [
        {
            "index": i,
            "image": base64_photo(p),
            "question": "What does it say?",
            "answer": str(["nasa"] * 7 + ["usa"] * 3),
        }
        for i, p in enumerate(PHOTOS)
    ]
    write_tsv(folder, text_vqa, "TextVQA_VAL.tsv")
    two = str([base64_photo("coffee"), base64_photo("rocket")])
    mmmu = [
        {"index": 1, "question": "Which is <image 2> beside <image 1>?", "A": "one", "B": "two <image 1>", "C": None,
         "answer": "B", "image": two, "split": "validation", "category": "Art"},
        {"index": 2, "question": "How many cups?", "A": None, "B": None, "C": None, "answer": "1",
         "image": base64_photo("coffee"), "split": "validation", "category": "Math"},
        {"index": 3, "question": "From dev", "A": "x", "B": "y", "C": None, "answer": "A",
         "image": base64_photo("coffee"), "split": "dev", "category": "Math"},
    ]  # fmt: skip
    write_tsv(folder, mmmu, "MMMU_DEV_VAL.tsv")
    vista = [
        {"index": 1, "image": base64_photo("coffee"), "question": "How many?", "choices": "['1', '2']", "answer": "2",
         "answer_option": "B", "question_type": "multi_choice", "answer_type": "text", "task": "counting"},
        {"index": 2, "image": base64_photo("coffee"), "question": "Width?", "choices": "[]", "answer": "1.5",
         "answer_option": None, "question_type": "free_form", "answer_type": "float", "task": "geometry"},
    ]  # fmt: skip
    write_tsv(folder, vista, "MathVista_MINI.tsv")
    return folder


def write_parquet_files(folder):
    """All eight, as on Hugging Face."""
    mmbench = []
    for i, name in enumerate(PHOTOS):
        for row in rotations(name, i):
            mmbench.append({**row, "hint": row["hint"] or "nan", "source": "web", "image": cell(name)})
    write_parquet(folder, mmbench, "MMBench/en/dev-00000-of-00001.parquet")
    seed = [
        {"question_id": f"{i}", "question": "What is it?", "data_type": kind, "question_type_id": 1, "answer": "B",
         **{f"choice_{k}": option for k, option in zip("abcd", OPTIONS, strict=True)}, "image": [cell(p)]}
        for i, (p, kind) in enumerate(zip(PHOTOS, ("image", "image", "video", "image"), strict=True))
    ]  # fmt: skip
    write_parquet(folder, seed, "SEED-Bench/data/test-00000-of-00001.parquet")
    star = [
        {"index": i, "question": "What is it?\nOptions: A: a cat, B: a rocket, C: an astronaut, D: a cup",
         "image": photo(p), "answer": "ABCD"[OPTIONS.index(ANSWER_OF[p])], "category": "coarse perception",
         "l2_category": "image topic", "meta_info": {"source": "x", "split": "val", "image_path": "y"}}
        for i, p in enumerate(PHOTOS)
    ]  # fmt: skip
    write_parquet(folder, star, "MMStar/val-00000-of-00001.parquet")
    vista = [
        {"pid": "1", "question": "How many cups?", "image": "images/1.jpg", "decoded_image": cell("coffee"),
         "choices": ["1", "2"], "unit": None, "precision": None, "answer": "1", "question_type": "multi_choice",
         "answer_type": "text", "metadata": {"task": "counting"}, "query": "..."},
        {"pid": "2", "question": "How wide?", "image": "images/2.jpg", "decoded_image": cell("coffee"),
         "choices": None, "unit": "cm", "precision": 1.0, "answer": "1.5", "question_type": "free_form",
         "answer_type": "float", "metadata": {"task": "geometry"}, "query": "..."},
    ]  # fmt: skip
    write_parquet(folder, vista, "MathVista/data/testmini-00000-of-00001.parquet")
    ai2d = [
        {"question": "What is it?", "options": list(OPTIONS), "answer": str(OPTIONS.index(ANSWER_OF[p])),
         "image": cell(p)} for p in PHOTOS
    ]  # fmt: skip
    write_parquet(folder, ai2d, "ai2d/data/test-00000-of-00001.parquet")
    text_vqa = [
        {"image_id": str(i), "question_id": i, "question": "what does the BADGE say?", "image": cell(p),
         "answers": ["nasa"] * 7 + ["usa"] * 3, "ocr_tokens": ["NASA"]} for i, p in enumerate(PHOTOS)
    ]  # fmt: skip
    write_parquet(folder, text_vqa, "textvqa/data/validation-00000-of-00001.parquet")
    pope = [
        {"id": str(i), "question_id": str(i), "question": "Is there a cat?",
         "answer": "yes" if p == "chelsea" else "no",
         "image_source": p, "image": cell(p), "category": "random"} for i, p in enumerate(PHOTOS)
    ]  # fmt: skip
    write_parquet(folder, pope, "POPE/data/test-00000-of-00001.parquet")
    mmmu = [
        {"id": "validation_Art_Theory_1", "question": "Which is <image 2> beside <image 1>?", "answer": "B",
         "options": "['one', 'two']", "question_type": "multiple-choice", "subfield": "Art_Theory",
         "image_1": cell("coffee"), "image_2": cell("rocket")},
        {"id": "validation_Math_2", "question": "How many cups in <image 1>?", "answer": "1", "options": "[]",
         "question_type": "open", "subfield": "Logic", "image_1": cell("coffee"), "image_2": None},
    ]  # fmt: skip
    write_parquet(folder, mmmu, "MMMU/Art/validation-00000-of-00001.parquet")
    return folder
