"""Shares a training run, an image set or a report on the Hub, with a card."""

from flax_pref.config import parse_flags
from flax_pref.sharing.push_flags import PushFlags


def main(arguments: list[str]) -> None:
    """Uploads the folder, or writes what would be uploaded."""
    flags = parse_flags(arguments, PushFlags)
    from flax_pref.sharing.push import push

    push(flags)
