"""Push a directory to a model repository on the Hub, by huggingface_hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_moe.errors import StorageError, UsageError, command_line
from gemma4_moe.hub.requests import refusals

if TYPE_CHECKING:
    from pathlib import Path


class Pushed(NamedTuple):
    """A repository's commit, as a full hash, and its page."""

    repository: str
    commit: str
    url: str


def check_repository(repository: str) -> None:
    """Check that a name can be that of a repository, and that huggingface_hub is there, without asking the Hub.

    Raises:
        UsageError: It can't, or it is not.
    """
    with refusals(repository):
        from huggingface_hub import utils
        from huggingface_hub.errors import HFValidationError

        client: Any = utils
        try:
            client.validate_repo_id(repository)
        except HFValidationError as error:
            raise UsageError("no name of a repository", expected="USER/MODEL", found=repository) from error


def push_directory(directory: Path, repository: str, *, private: bool) -> Pushed:
    """Upload the files of a directory in one commit; a repository that does not exist is made.

    Content that the Hub has already, such as of an upload that broke off, is not sent again.

    Raises:
        StorageError: The Hub can't be reached, or refuses.
    """
    with refusals(repository):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(library_name="gemma4-moe")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=directory,
                commit_message="Publish with gemma4-moe",
                ignore_patterns=[".cache/**"],
            )
        except (HfHubHTTPError, RuntimeError) as error:  # RuntimeError: any failure to send one file's content
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
            status = getattr(getattr(cause, "response", None), "status_code", None)
            raise StorageError(
                "the upload failed" if status is None else f"the Hub refuses the upload: status {status}",
                file=repository,
                found=None if status is not None else str(error)[:200],
                hint="`hf auth login` with a token that may write to it; the directory is complete: "
                f"{command_line('hf', 'upload', repository, directory)}",
            ) from error
    return Pushed(repository, commit.oid, f"{commit.repo_url}/tree/{commit.oid}")
