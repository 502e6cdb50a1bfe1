"""python -m oq2vl_jax.serve: serves a checkpoint in OpenAI's chat-completions format, with a page to try it.

    python -m oq2vl_jax.serve --checkpoint runs/sft_llava
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d '{"messages": [{"role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                    {"type": "text", "text": "What is it?"}]}]}'

Concurrent requests are decoded together. VLMEvalKit and lmms-eval can evaluate the checkpoint through their OpenAI
clients.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from oq2vl_jax.bounds import Between, Length, SmallCount, check_bounds, parse
from oq2vl_jax.config import PromptForm, Template, Weights
from oq2vl_jax.errors import UserError, run_command

MIB = 2**20
SWITCH_INTERVAL = 0.0005
"""Seconds until a waiting thread gets the interpreter; with Python's default of 0.005, uploads delay replies."""


@dataclass(frozen=True)
class ServeConfig:
    """Serves a checkpoint over HTTP."""

    checkpoint: str
    """Run directory (its newest checkpoint) or one checkpoint folder."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 serves other machines too; give an --api-key then."""
    port: Annotated[int, Between(0, 2**16 - 1)] = 8000
    batch_size: SmallCount = 8
    """Requests decoded together."""
    max_context: Length = 4096
    """Limit on the tokens of a prompt with its images and reply; sets the size of the KV cache."""
    max_waiting: SmallCount = 256
    """Requests that may wait; more are answered with status 429."""
    max_body_mib: SmallCount = 20
    """Largest request; larger ones are answered with status 413."""
    max_held_mib: SmallCount = 512
    """Bodies and pictures of all requests held at once; more are answered with status 503."""
    allow_files: str | None = None
    """Folder whose images requests may name by path; none by default."""
    allow_host: tuple[str, ...] = ()
    """Names to accept in the Host header besides localhost and --host. Default: none on loopback, any elsewhere."""
    allow_origin: tuple[str, ...] = ()
    """Sites whose pages may send requests from a browser, such as https://example.org; "*": any."""
    api_key: str | None = None
    """API key that clients must send; default: the environment variable OQ2VL_API_KEY, else no key is required."""
    prompt_form: PromptForm = "training"
    """published: prompts as the paper's code writes them for its released weights (only template open_qwen2vl)."""
    template: Template | None = None
    """Template of the conversations; default: that of the checkpoint's training data."""
    weights: Weights = "model"
    """ema: the averaged weights of a run with --ema.decay."""
    projector: str | None = None
    """FILE.py:NAME, the projector of your own that the checkpoint was trained with."""


def check(config: ServeConfig) -> None:
    check_bounds(config, as_flags=True)
    if config.allow_files is not None and not Path(config.allow_files).is_dir():
        raise UserError(f"--allow-files {config.allow_files}: no such folder.")


def check_port(config: ServeConfig) -> None:
    """Raises UserError if the server cannot listen at host and port. Called before the checkpoint is loaded."""
    import errno
    import socket

    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"cannot listen at {config.host}:{config.port} ({error.strerror}); choose another "
                f"{'--port' if error.errno in (errno.EADDRINUSE, errno.EACCES) else '--host'}."
            ) from error


def main() -> None:
    config = parse(ServeConfig, prog="python -m oq2vl_jax.serve")
    check(config)
    try:
        from oq2vl_jax.serve.app import Server
        from oq2vl_jax.serve.gate import Admission
        from oq2vl_jax.serve.http import run_server
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install the extra: pip install 'oq2vl-jax[serve]'.") from error
    from oq2vl_jax.generate.generator import Generator
    from oq2vl_jax.serve.engine import Engine

    check_port(config)
    generator = Generator(
        config.checkpoint,
        config.template,
        prompt_form=config.prompt_form,
        weights=config.weights,
        projector=config.projector,
    )
    engine = Engine(generator, config.batch_size, config.max_context, config.max_waiting)
    name, key = Path(config.checkpoint).name, config.api_key or os.environ.get("OQ2VL_API_KEY")
    admission = Admission.of(config.host, config.allow_host, config.allow_origin, key)
    server = Server(engine, name, config.max_body_mib * MIB, config.max_held_mib * MIB, config.allow_files, admission)
    sys.setswitchinterval(SWITCH_INTERVAL)
    print(f"serving {generator.checkpoint} at http://{config.host}:{config.port}", flush=True)
    run_server(server.app(), config.host, config.port, engine.drain)


if __name__ == "__main__":
    run_command(main)
