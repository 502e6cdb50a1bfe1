"""Size xs of the ladder (oq2vl_jax/config/ladder.py): width 128, 12 layers, from scratch on the rows of pretrain.py.

python -m oq2vl_jax.train ladder/xs
"""

from pathlib import Path

from oq2vl_jax.config.ladder import ladder
from oq2vl_jax.config_files import load_config

config = ladder(load_config(str(Path(__file__).parent.parent / "pretrain.py")), width=128, depth=12)
