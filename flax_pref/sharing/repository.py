"""The upload: one commit to a repository of the Hub that is new, or that holds an earlier push of the same folder."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from flax_pref.checkpoints.hub import HUB_ID, RECORD, UNREACHABLE
from flax_pref.config import UserError
from flax_pref.sharing.contents import Contents

EMPTY = {".gitattributes", "README.md"}  # files that the Hub makes itself


def check_repository_id(repository: str) -> None:
    """Raises a UserError unless it can be the id of a repository, USER/NAME."""
    try:
        validate_repo_id(repository)
        if HUB_ID.fullmatch(repository):
            return
        reason = "no USER/NAME"
    except HFValidationError as error:
        reason = str(error).partition(":")[0].rstrip(".")
    raise UserError(
        f"--repo {repository}: cannot be the id of a repository ({reason}); expected USER/NAME of letters, digits, "
        "'-', '_' and '.', e.g. anna/dpo-modules"
    )


def upload(contents: Contents, repository: str, token: str | None, *, private: bool = False) -> str:
    """Makes the commit; creates the repository if it does not exist.

    Files of an earlier push that are no longer part of the contents are deleted.

    Args:
        contents: what to upload.
        repository: its id, `USER/NAME`.
        token: of the user.
        private: whether a new repository is.

    Returns:
        where to see it, for the user.

    Raises:
        UserError: there is no token, the Hub cannot be reached or refuses, or the repository holds something else.
    """
    kind = contents.kind.repository
    if token is None:
        raise UserError("no token of the Hub; run hf auth login, or set HF_TOKEN to a token that may write")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set; unset it to upload, or add --dry-run")
    api = HfApi(token=token, library_name="flax_pref")
    with _told(repository, token):
        api.whoami()
        stale = _stale_files(api, contents, repository)
        if stale is None:
            api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        operations = [CommitOperationDelete(path_in_repo=name) for name in stale or ()]
        operations += [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=source if isinstance(source, bytes) else str(source))
            for name, source in contents.files.items()
        ]
        message = f"Add {contents.name}" if stale is None else f"Update {contents.name}"
        commit = api.create_commit(repository, operations, commit_message=message, repo_type=kind)
    place = repository if kind == "model" else f"{kind}s/{repository}"
    return f"uploaded {len(contents.files)} files to {api.endpoint}/{place}, commit {commit.oid}"


def _stale_files(api: HfApi, contents: Contents, repository: str) -> list[str] | None:
    """Files of an earlier push that this one does not have; None: there is no repository yet.

    Raises:
        UserError: it holds something else.
    """
    kind = contents.kind.repository
    try:
        names = set(api.list_repo_files(repository, repo_type=kind))
    except RepositoryNotFoundError:
        return None
    if names <= EMPTY:
        return []
    earlier = _record(api, repository, kind) if RECORD in names else {}
    if (earlier.get("kind"), earlier.get("name")) != (contents.kind.name, contents.name):
        held = f"the {earlier['kind']} {earlier['name']}" if earlier else ", ".join(sorted(names - EMPTY)[:3])
        raise UserError(
            f"{repository}: exists and holds {held}; expected a new or empty repository, or an earlier push of "
            f"{contents.name}: choose another --repo"
        )
    return sorted(names.intersection(earlier["files"]).difference(contents.files))


def _record(api: HfApi, repository: str, kind: str) -> dict[str, Any]:
    """The record of an earlier push; empty where it is not one."""
    with contextlib.suppress(ValueError):
        record = json.loads(Path(api.hf_hub_download(repository, RECORD, repo_type=kind)).read_bytes())
        if isinstance(record, dict) and isinstance(record.get("files"), list) and {"kind", "name"} <= record.keys():
            return record
    return {}


@contextlib.contextmanager
def _told(repository: str, token: str) -> Iterator[None]:
    """Makes what the Hub or the network refuses a line for the user, without the token."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the token is not valid; run hf auth login, or set HF_TOKEN to another",
            403: "the token may not write there; choose a name of your own in --repo, or a token with write access",
        }.get(status, "try again later, or look at https://status.huggingface.co")
        reason = f": {error.server_message}".replace(token, "***") if error.server_message else ""
        raise UserError(f"{repository}: the Hub refuses the upload (status {status}{reason}); {advice}") from None
    except RuntimeError as error:  # of a file whose upload broke off
        reason = f"{error} {error.__cause__ or ''}".strip().replace(token, "***")
        reason = re.sub(r"\?[^\s;]+", "", reason)  # addresses for uploads are signed
        raise UserError(f"{repository}: {reason}; nothing is changed there: run the same command again") from None
    except UNREACHABLE as error:
        reason = (str(error) or type(error).__name__).replace(token, "***")
        raise UserError(
            f"{repository}: {constants.ENDPOINT} cannot be reached ({reason}); connect to the network, or add --dry-run"
        ) from None
