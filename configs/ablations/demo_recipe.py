"""The demo's two stages with AdamW, as they are, or with Muon in fewer steps: which ends better?

python -m oq2vl_jax.ablate run demo_recipe --out runs/demo_recipe

The data are those of `make demo`, in demo/. A seed of Muon takes two thirds of the time.
"""

from oq2vl_jax.lab.definition import Ablation, Task

ablation = Ablation(
    question="Does the demo learn easy-VQA more surely with Muon in fewer steps than with AdamW?",
    stages={"captions": "easy_vqa", "questions": "easy_vqa_tune"},
    arms={
        "adamw": {},
        "muon": {"*.optimizer.kind": "muon", "captions.num_steps": 800, "questions.num_steps": 1200},
    },
    baseline="adamw",
    tasks=(Task("easy_vqa", data="demo/data/test"),),
    primary="easy_vqa:accuracy",
    smallest_effect=0.005,
    floor_seeds=0,
)
