"""A repository of the Hugging Face hub that a trained model goes to."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

_ALLOWED = "allowed: hf auth login, or HF_TOKEN in the environment, as one who may write there"


def make_repository(name: str, *, private: bool) -> str:
    """Make sure that there is such a repository, which may be there already; its name with its owner's.

    Args:
        name: "owner/name", or a name, which is then the user's own.
        private: what a repository is that is not there yet. Otherwise it is as its owner has it by default.

    Raises:
        ValueError: no token is found, or the hub refuses, or it is not reached.
    """
    if huggingface_hub.get_token() is None:
        raise ValueError(f"push_to_hub is true, but no token for the Hugging Face hub is found; {_ALLOWED}")
    try:
        return str(huggingface_hub.create_repo(name, private=private or None, exist_ok=True).repo_id)
    except Exception as error:  # of the hub's classes, and of those that it calls
        raise ValueError(f"push_to_hub is true, but {name!r} cannot be written: {_line(error)}; {_ALLOWED}") from error


def upload_model(folder: Path, repository: str) -> str:
    """Upload a model folder as one commit; its URL.

    Raises:
        OSError: it could not be uploaded, with how to try again.
    """
    try:
        commit = huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="End of training")
    except Exception as error:
        raise OSError(
            f"the model could not be uploaded to {repository}: {_line(error)}; it is in {folder}, and "
            f"hf upload {repository} {folder} tries again"
        ) from error
    return str(commit.commit_url)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
