"""Size m of the ladder (oq2vl_jax/config/ladder.py): width 1024, 22 layers, from scratch on the rows of pretrain.py.

python -m oq2vl_jax.train ladder/m
"""

from pathlib import Path

from oq2vl_jax.config.ladder import ladder
from oq2vl_jax.config_files import load_config

config = ladder(load_config(str(Path(__file__).parent.parent / "pretrain.py")), width=1024, depth=22)
