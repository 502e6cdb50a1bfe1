"""python -m oq2vl_jax.eval: evaluates a checkpoint on benchmarks in local files.

    python -m oq2vl_jax.eval --checkpoint runs/sft_llava --tasks mmbench,pope --data benchmarks --out results

    OUT/results.json             accuracy with its interval, per category, unparsed rate, profile, data hash, checkpoint
    OUT/TASK/predictions.jsonl   every item with its reply, the answer parsed from it, and its score
    OUT/TASK/mistakes.html       a page of mistakes to look at

After an interruption the same command continues where it stopped and writes the same results.json.
"""

from oq2vl_jax.bounds import parse
from oq2vl_jax.errors import run_command
from oq2vl_jax.eval.eval_config import EvalConfig, check


def main() -> None:

    config = parse(EvalConfig, prog="python -m oq2vl_jax.eval")
    check(config)
    from oq2vl_jax.eval.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    run_command(main)
