"""Absurd numbers for every flag of every command: one sentence, before anything is loaded or begun."""

import dataclasses
import importlib
from typing import get_type_hints

import pytest

from oq2vl_jax import bounds
from oq2vl_jax.bench.__main__ import NAMES
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.config_files import from_dict
from oq2vl_jax.errors import UserError
from oq2vl_jax.train.run import run
from tests.train.conftest import TINY, tiny_model

ABSURD = (0, -1, 10**10, 2**63, 10**30)
COMMANDS = {
    "oq2vl_jax.train.__main__": ("TrainCommand", ["configs/tiny.py"]),
    "oq2vl_jax.generate.__main__": ("GenerateConfig", ["--checkpoint", "none"]),
    "oq2vl_jax.eval.__main__": ("EvalConfig", ["--checkpoint", "none", "--tasks", "x", "--data", "x", "--out", "x"]),
    "oq2vl_jax.serve.__main__": ("ServeConfig", ["--checkpoint", "none"]),
    "oq2vl_jax.data.pack": ("PackConfig", ["--shards", "none", "--out", "x", "--tokenizer", "none"]),
    "oq2vl_jax.curate.reshard": ("ReshardConfig", ["--shards", "none", "--out", "x", "--uids", "none"]),
    "oq2vl_jax.curate.score": ("ScoreConfig", ["--shards", "none", "--out", "x", "--model", "clip"]),
    "oq2vl_jax.ablate": ("RunCommand", ["none", "--out", "x"]),
    "oq2vl_jax.demo.emoji": ("EmojiConfig", ["--out", "x"]),
    "oq2vl_jax.compare": ("CompareCommand", ["none", "none"]),
    "oq2vl_jax.curate.overlap": ("OverlapConfig", ["none", "--tasks", "x", "--out", "x"]),
    "oq2vl_jax.data.inspect": ("InspectCommand", ["none"]),
    "oq2vl_jax.curate.filter.run": ("FilterCommand", ["none", "--metadata", "none", "--out", "x"]),
    "oq2vl_jax.demo.report": ("ReportConfig", ["--run-dir", "x", "--out", "x"]),
    "oq2vl_jax.demo.easy_vqa": ("EasyVQAConfig", ["--out", "x"]),
    "convert.from_hf": ("FromHFConfig", ["--out", "x"]),
    "convert.ask_hf": ("AskHFConfig", ["none", "--prompt", "x"]),
    "convert.from_clip": ("FromClipConfig", ["none", "--out", "x"]),
    "convert.from_prismatic": ("FromPrismaticConfig", ["none", "--out", "x"]),
    "convert.to_hf": ("ToHFConfig", ["none", "--out", "x"]),
    "convert.to_prismatic": ("ToPrismaticConfig", ["none", "--out", "x"]),
} | {
    f"oq2vl_jax.bench.{name}": ("OPTIONS", {"pack": ["--tokenizer", "none"], "rows": ["--tokenizer", "none"],
                                                   "plan": ["none"], "report": ["--out", "x"],
                                                   "quality": ["none", "--target", "1"]}.get(name, []))
    for name in NAMES
}  # fmt: skip
ZERO_MEANS = {
    "seed", "first_seed", "top_k", "rank", "num_pictures", "kernels", "warmup_steps", "process_id", "image_token_id",
    "port", "num_samples", "num_workers", "max_distance", "gpus_per_worker",
}  # fmt: skip


def numbers_of(kinds, prefix=""):
    """(flag, bounds) of every number of a dataclass and those in it, by their types alone."""
    for field in dataclasses.fields(kinds):
        kind = get_type_hints(kinds, include_extras=True)[field.name]
        inner = kind.__origin__ if hasattr(kind, "__metadata__") else kind
        if dataclasses.is_dataclass(inner):
            is_omitted = inner.__name__ in ("Execution", "TrainConfig")
            yield from numbers_of(inner, prefix if is_omitted else f"{prefix}{field.name}.")
        elif any(word in str(kind) for word in ("int", "float")) and "Literal" not in str(kind):
            found = [x for x in flattened(kind) if isinstance(x, bounds.Between)]
            yield f"--{prefix}{field.name}".replace("_", "-"), found


def flattened(kind):
    yield from getattr(kind, "__metadata__", ())
    for part in getattr(kind, "__args__", ()):
        yield from flattened(part)


@pytest.mark.parametrize("module", COMMANDS)
def test_absurd_numbers_are_refused_by_their_names(module):
    name, arguments = COMMANDS[module]
    command, num_refused = getattr(importlib.import_module(module), name), 0
    for flag, found in numbers_of(command):
        assert found, f"{module} {flag} takes any number"
        refused = [value for value in ABSURD if not found[0].holds(value)]
        taken = set(ABSURD) - set(refused)
        is_size = isinstance(found[0].high, int)  # of rates and shares nothing is made that takes memory
        may_be_zero = flag.split(".")[-1].lstrip("-").replace("-", "_") in ZERO_MEANS
        assert not is_size or taken <= ({0} if may_be_zero else {0, -1} if flag.startswith("--mesh.") else set()), flag
        for value in (refused[0], refused[-1]) if refused else ():  # the rest differ in nothing but the number
            assert refusal(command, module, [*arguments, flag, str(value)]), f"{module} {flag} {value}"
        num_refused += len(refused)
    print(f"{module}: {num_refused} refused")


def refusal(command, module, arguments):
    """The sentence, or None where the command line is taken. Whatever else is raised fails the test."""
    try:
        if module == "oq2vl_jax.train.__main__":
            importlib.import_module(module).parse(arguments)
        else:
            from tyro.conf import OmitArgPrefixes

            bounds.parse(command, prog=module, args=arguments, config=(OmitArgPrefixes,))
    except UserError as error:
        return str(error)
    except SystemExit as left:  # of tyro: a dataclass's own check, in a box on stderr
        return "refused" if left.code == 2 else None
    return None


def of_tiny(**changes):
    values = dataclasses.asdict(TINY)
    for name, value in changes.items():
        part, _, field = name.partition("__")
        (values["model"][part] if field else values["model"])[field or part] = value
    return from_dict(TrainConfig, values, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder__head_dim": 3}, "head_dim = 3 is odd"),
        ({"vision__num_layers": 1}, "2 is the least"),
        ({"vision__patch_size": 64}, "num_visual_tokens = 4 is more than the 0 patches"),
        ({"num_visual_tokens": 2**18}, "is more than the 16 patches"),
        ({"vision__num_heads": 0}, "here: model: vision: num_heads must be 1 to 1,024, got 0"),
        ({"image_token_id": 320}, "outside the vocabulary of 320"),
    ],
)
def test_models_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        of_tiny(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch_size": 2**20}, r"3 batches of 1,048,576 rows would take [\d,.]+ GiB, and this machine has"),
        ({"model": dataclasses.replace(TINY.model, decoder=dataclasses.replace(TINY.model.decoder, hidden_size=2**20))},
         r"weights, optimizer state and a batch of one device would take [\d,.]+ GiB, and it has"),
        ({"mesh": dataclasses.replace(TINY.mesh, data=2**20)}, "does not fit 8 devices"),
    ],
)  # fmt: skip
def test_what_cannot_fit_says_how_much_it_would_take(change, message, tmp_path):
    config = dataclasses.replace(TINY, run_dir=str(tmp_path / "run"), **change)
    with pytest.raises(UserError, match=message):
        run(config)
    assert not (tmp_path / "run" / "data").exists()


def test_a_cache_that_cannot_fit_says_how_much_it_would_take(tmp_path):
    from oq2vl_jax.data.text.bpe import BYTE_RANKS, save_bpe_tokenizer
    from oq2vl_jax.data.text.codec import TextCodec
    from oq2vl_jax.generate.generator import Generator, Request
    from oq2vl_jax.generate.reply import SamplingOptions
    from oq2vl_jax.serve.engine import Engine
    from oq2vl_jax.sharding import make_mesh

    save_bpe_tokenizer(BYTE_RANKS, str(tmp_path / "tokenizer"))
    codec, mesh = TextCodec.load(str(tmp_path / "tokenizer")), make_mesh(TINY.mesh)
    generator = Generator.of_model(tiny_model(), TINY.model, "plain", codec, mesh, "float32")
    request = Request(generator.encode_prompt("what is it?", 0), [])
    with pytest.raises(UserError, match=r"cache of 4,096 rows of [\d,]+ tokens would take [\d,.]+ GiB, and what"):
        generator.generate([request] * 4096, SamplingOptions(2**20))
    with pytest.raises(UserError, match="the cache of 65,536 rows"):
        Engine(generator, 65_536, 2**20, 8)
