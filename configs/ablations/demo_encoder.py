"""Frozen or trained encoder while the demo learns questions, as in the published tuning or not.

python -m oq2vl_jax.ablate run demo_encoder --out runs/demo_encoder

The data are those of `make demo`, in demo/.
"""

from oq2vl_jax.lab.definition import Ablation, Task

ablation = Ablation(
    question="Should the encoder be frozen, trained, or trained slowly while the demo learns questions?",
    stages={"captions": "easy_vqa", "questions": "easy_vqa_tune"},
    arms={
        "frozen": {},
        "trained": {"questions.trainable.vision": True},
        "tenth": {"questions.trainable.vision": True, "questions.optimizer.vision_learning_rate": 1.2e-4},
    },
    baseline="frozen",
    tasks=(Task("easy_vqa", data="demo/data/test"),),
    primary="easy_vqa:accuracy",
    smallest_effect=0.005,
    floor_seeds=0,
)
