"""From a folder to a repository of the Hub, or to the folder that would be uploaded."""

import shutil
from pathlib import Path

from huggingface_hub import get_token

from flax_pref.config import UserError
from flax_pref.files import new_folder, writing
from flax_pref.sharing.contents import Contents, gather
from flax_pref.sharing.push_flags import PushFlags
from flax_pref.sharing.repository import check_repository_id, upload

TEXTS = (".csv", ".html", ".json", ".jsonl", ".md", ".tex", ".txt")  # files in which a token could be read


def push(flags: PushFlags) -> None:
    """Uploads what a folder holds, with its card, in one commit; or writes it. Prints what it does.

    Raises:
        UserError, ValueError, OSError: the folder holds nothing to share, or the Hub refuses it or is out of reach.
    """
    check_repository_id(flags.repo)
    contents = gather(flags)
    print(f"{flags.folder}: {contents.told}")
    for line in contents.notes:
        print(f"note: {line}")
    token = get_token()
    check_secret(contents, token)
    if flags.dry_run:
        out = write(contents, Path(flags.out))
        print(f"wrote {len(contents.files)} files of the {contents.kind.repository} repository {flags.repo} to {out}")
        print("uploaded nothing (--dry-run)")
    else:
        print(upload(contents, flags.repo, token, private=flags.private))


def check_secret(contents: Contents, token: str | None) -> None:
    """Checks that no text to be shared holds the token of the user.

    Raises:
        UserError: a file does; names the file, not the token.
    """
    for name, source in contents.files.items() if token else ():
        if name.endswith(TEXTS):
            text = source if isinstance(source, bytes) else source.read_bytes()
            if token and token.encode() in text:
                raise UserError(f"{name}: holds your token of the Hub; remove it there, and replace the token")


def write(contents: Contents, folder: Path) -> Path:
    """Writes the files into a new folder.

    Raises:
        FileExistsError: the folder holds something.
        OSError: it cannot be written.
    """
    with writing(folder), new_folder(folder) as unfinished:
        for name, source in contents.files.items():
            file = unfinished / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                file.write_bytes(source)
            else:
                shutil.copyfile(source, file)
    return folder
