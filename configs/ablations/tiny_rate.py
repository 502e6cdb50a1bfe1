"""The laboratory in minutes, on synthetic shapes: three learning rates, five seeds. No quality is expected.

python -m oq2vl_jax.ablate run tiny_rate --out runs/tiny_rate
"""

from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Does a smaller or larger learning rate fit the synthetic shapes better?",
    stages={"shapes": "tiny"},
    arms={
        "baseline": {},
        "third": {"shapes.optimizer.learning_rate": 1e-3},
        "triple": {"shapes.optimizer.learning_rate": 9e-3},
    },
    primary="loss",
    smallest_effect=0.1,
)
