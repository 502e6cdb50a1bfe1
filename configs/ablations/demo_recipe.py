"""The demo's two stages with the schedule that stays at its peak, as they are, or with a cosine, as published.

python -m oq2vl_jax.ablate run demo_recipe --out runs/demo_recipe

The data are those of `make demo`, in demo/.
"""

from oq2vl_jax.lab.definition import Ablation, Task

ablation = Ablation(
    question="Does the demo learn easy-VQA as surely with a cosine as with warm-up, stable, decay?",
    stages={"captions": "easy_vqa", "questions": "easy_vqa_tune"},
    arms={"wsd": {}, "cosine": {"*.schedule.kind": "cosine"}},
    baseline="wsd",
    tasks=(Task("easy_vqa", data="demo/data/test"),),
    primary="easy_vqa:accuracy",
    smallest_effect=0.005,
    floor_seeds=0,
)
