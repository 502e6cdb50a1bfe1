"""What the scripts share that run in other environments, where nothing of this project is installed.

Each is run as `python ask_NAME.py MODEL REQUESTS OUT` and writes {"versions", "prompts", "alone", "together"}: token
ids of the prompts, and of the replies without what ends them, one by one and in one batch. One that changes the model
saves it as OUT.saved, and adds its replies as "saved" and {what should hold: whether it does} as "checks".
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

MAX_NEW_TOKENS = 24


def read_arguments():
    """(folder of the model, requests: {"text", "images"}, file to write)."""
    model, requests, out = sys.argv[1:]
    return model, json.loads(Path(requests).read_text()), Path(out)


def messages_of(request):
    content = [{"type": "image"}] * len(request["images"]) + [{"type": "text", "text": request["text"]}]
    return [{"role": "user", "content": content}]


def without_ends(tokens, ends):
    """The tokens before the first that ends a reply."""
    place = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:place])


def write_answers(out, packages, **answers):
    versions = {name: version(name) for name in packages}
    out.write_text(json.dumps({"versions": versions, "python": sys.version.split()[0], **answers}))
