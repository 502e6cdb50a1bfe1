"""Pushes an export to the Hugging Face hub. huggingface_hub finds the token (HF_TOKEN, or `hf auth login`) and the hub
(HF_ENDPOINT); nothing here reads, prints or stores a token."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oq2vl_jax.errors import UserError

OF_EXPORTS: tuple[str, ...] = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.py")
"""Files of an earlier export: a loader would prefer its index of shards to a new file without shards."""
REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w-]|\.(?!\.))*/[A-Za-z0-9](?:[\w-]|\.(?!\.))*(?<![.-])")
CLIENTS = ("httpx", "httpx2", "requests", "urllib3")
"""Packages whose errors mean the line: which of them huggingface_hub asks with differs by version."""
WAYS_OUT = {
    401: "the hub does not accept the token: set HF_TOKEN to one that may write, or run `hf auth login`",
    403: "the token may not do that: take one that may write, of an account that belongs to the organisation",
    404: "the hub knows no such repository, or the token may not see it",
    409: "the hub refuses it as a conflict; look at the repository's page, then push again",
    429: "the hub asks for patience: wait some minutes",
}


def check_can_push(repository: str) -> None:
    """Raises UserError for a name that is no ORG/NAME, or if the hub does not accept the token."""
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"--push-to-hub {repository}: expected ORG/NAME, such as my-lab/open-qwen2vl-2b.")
    from huggingface_hub import HfApi

    with hub_errors(f"--push-to-hub {repository}"):
        HfApi().whoami()


def push(folder: Path, repository: str, is_private: bool) -> str:
    """Makes the repository if it is not there and uploads a folder in one commit, which removes what an earlier export
    left there; returns its address.

    Raises UserError; the files on the hub are then as they were before, and the folder is still here.
    """
    from huggingface_hub import HfApi

    with hub_errors(
        f"{folder} is whole, but was not pushed to {repository}", f"; then: hf upload {repository} {folder}"
    ):
        api = HfApi()
        url = api.create_repo(repository, private=is_private or None, exist_ok=True)
        message, old = "Exported by oq2vl_jax", [*OF_EXPORTS]
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=old)
    return str(url)


@contextmanager
def hub_errors(what: str, then: str = "") -> Iterator[None]:
    """Turns errors of the hub and of the line to it into UserError with a way out."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{what}: there is no token: set HF_TOKEN, or run `hf auth login`{then}.") from error
    except HFValidationError as error:
        raise UserError(f"{what}: {first_line(error)}{then}.") from error
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OSError) and type(error).__module__.split(".")[0] not in CLIENTS:
            raise
        causes = [one for one in causes_of(error) if isinstance(one, HfHubHTTPError) and one.response is not None]
        if causes:
            status = causes[-1].response.status_code
            way_out = WAYS_OUT.get(status, f"the hub answers {status}: wait, and look at status.huggingface.co")
            raise UserError(f"{what}: {way_out}{then}.") from error
        reason = first_line(causes_of(error)[-1]) or type(error).__name__
        raise UserError(f"{what}: the hub cannot be reached, or the line dropped ({reason}){then}.") from error


def causes_of(error: BaseException) -> list[BaseException]:
    """Returns an error and what caused it: a download wraps the hub's answer into an error about missing files."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None:
        chain.append(following)
        following = following.__cause__
    return chain


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "").rstrip(".")
