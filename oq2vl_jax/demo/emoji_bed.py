"""The laptop bed of the first ablations: what prepares it, and what is asked."""

from oq2vl_jax.lab.definition import Task

PACK = (
    "python -m oq2vl_jax.data.pack --shards emoji/data/{0}/*.tar --out emoji/packed/{0} "
    "--tokenizer emoji/data/tokenizer --num-tokens 256 --max-images 10 --visual-tokens 16 --template plain"
)
PREPARE = (
    "python -m oq2vl_jax.demo.emoji --out emoji/data --num-concepts 500",
    PACK.format("captions"),
    PACK.format("held_out"),
)
TASK = Task("emoji", data="emoji/data/test", profile="open_qwen2vl")
"""By options, the picture alone: the bed's models have seen captions only."""
