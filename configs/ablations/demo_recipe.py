"""The demo's two stages with Muon, as they are, or with AdamW and the steps that it had before: which ends better?

python -m oq2vl_jax.ablate run demo_recipe --out runs/demo_recipe

The data are those of `make demo`, in demo/. An AdamW seed takes twice as long as one with Muon.
"""

from oq2vl_jax.lab.definition import Ablation, Task

ablation = Ablation(
    question="Does the demo learn easy-VQA more surely with Muon in half the steps than with AdamW?",
    stages={"captions": "easy_vqa", "questions": "easy_vqa_tune"},
    arms={
        "adamw": {"*.optimizer.kind": "adamw", "captions.num_steps": 900, "questions.num_steps": 2200},
        "muon": {},
    },
    baseline="adamw",
    tasks=(Task("easy_vqa", data="demo/data/test"),),
    primary="easy_vqa:accuracy",
    smallest_effect=0.005,
    floor_seeds=0,
)
