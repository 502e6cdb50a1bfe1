"""python -m oq2vl_jax.bench.parts NAME SETTING OUT: runs one part of a report and writes its figures to OUT.

`bench report` starts this process and holds the other end of its standard input. When that end closes because the
report was killed, this process and all that it started end as well.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from oq2vl_jax.bench.parts import decoding, device, exactness, learning, peers, plans, steps
from oq2vl_jax.bench.parts.setting import Setting, Skipped
from oq2vl_jax.paths import write_text
from oq2vl_jax.runtime import WITHOUT_TRITON_PRODUCTS, set_environment

PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "probe": lambda _: device.probe(),
    "device": device.measure,
    "exactness": exactness.measure_attention,
    "exactness_step": exactness.measure_step,
    "step": steps.measure,
    **{f"step_{name}": partial(steps.variant, name=name) for name in steps.VARIANTS},
    "peers": peers.measure,
    "sft": steps.sft,
    "full_pretrain": steps.full_pretrain,
    "decoding": decoding.measure,
    "decoding_transformers": decoding.measure_transformers,
    "profile": steps.profile,
    "learning": learning.measure,
    **{f"plan_{name}": partial(plans.measure, device=name) for name in plans.DEVICES},
}


WITHOUT_GRAPHS = {"--xla_gpu_enable_command_buffer": ""}
"""Turns CUDA graphs off: a profile does not name the kernels that they start."""
FLAGS = {"profile": WITHOUT_GRAPHS} | dict.fromkeys(
    ("exactness", "exactness_step", "learning"), WITHOUT_TRITON_PRODUCTS
)
"""XLA flags of parts. Parts b and g look at numbers, not at times, and need not tune their products."""


def main() -> None:
    name, setting, out = sys.argv[1:]
    faulthandler.register(signal.SIGUSR1)  # the report sends it to a part that hangs, for its log
    threading.Thread(target=end_with_the_report, daemon=True).start()
    set_environment(FLAGS.get(name))
    try:
        figures = PARTS[name](Setting(**json.loads(setting)))
    except Skipped as reason:
        figures = {"skipped": str(reason)}
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("oq2vl_jax"):
            raise
        figures = {"skipped": f"it needs the package {error.name}"}
    write_text(out, json.dumps(figures, indent=1))
    sys.stdout.flush()
    os._exit(0)  # a device that hangs at exit must not delay the next part


def end_with_the_report() -> None:
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    assert Path(sys.argv[-1]).suffix == ".json"
    main()
