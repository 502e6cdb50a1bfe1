"""What filtering buys: one caption of the demo in ten is wrong, and filter_easy_vqa.toml takes them out.

python -m oq2vl_jax.ablate run demo_filtering --out runs/demo_filtering

The data are those of `make demo`, in demo/, with all captions packed beside them. Both arms see as many real tokens.
"""

from oq2vl_jax.lab.definition import Ablation, Task

ablation = Ablation(
    question="What does it cost to train on captions of which one in ten is wrong?",
    stages={"captions": "easy_vqa", "questions": "easy_vqa_tune"},
    arms={"filtered": {}, "all": {"captions.data.sources": ("demo/packed/captions_all",)}},
    baseline="filtered",
    match="tokens",
    tasks=(Task("easy_vqa", data="demo/data/test"),),
    primary="easy_vqa:accuracy",
    smallest_effect=0.005,
    floor_seeds=0,
    prepare=(
        "python -m oq2vl_jax.data.pack --shards demo/data/captions/*.tar --out demo/packed/captions_all "
        "--tokenizer demo/data/tokenizer --num-tokens 256 --max-images 10 --visual-tokens 16 --template plain",
    ),
)
