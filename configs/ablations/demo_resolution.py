"""Low to high resolution: captions with 16 visual tokens a picture, then questions with 64; or 64 from the start.

python -m oq2vl_jax.ablate run demo_resolution --out runs/demo_resolution

The data are those of `make demo`, in demo/, with captions packed for 64 visual tokens beside them.
"""

from oq2vl_jax.lab.definition import Ablation, Task

high = {"captions.model.num_visual_tokens": 64, "captions.data.sources": ("demo/packed/captions_64",)}

ablation = Ablation(
    question="Does pre-training with few visual tokens cost quality, at equal FLOPs and at equal steps?",
    stages={"captions": "easy_vqa", "questions": "easy_vqa_tune"},
    arms={"low_to_high": {}, "high_equal_flops": high, "high_equal_steps": high | {"captions.num_steps": 700}},
    baseline="low_to_high",
    match="flops",
    tasks=(Task("easy_vqa", data="demo/data/test"),),
    primary="easy_vqa:accuracy",
    smallest_effect=0.005,
    floor_seeds=0,
    prepare=(
        "python -m oq2vl_jax.data.pack --shards demo/data/filtered/*.tar --out demo/packed/captions_64 "
        "--tokenizer demo/data/tokenizer --num-tokens 256 --max-images 10 --visual-tokens 64 --template plain",
    ),
)
