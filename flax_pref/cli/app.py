"""Serves a page to play with: base and guided image side by side, from the same noise."""

from flax_pref.app.app_flags import AppFlags
from flax_pref.config import parse_flags


def main(arguments: list[str]) -> None:
    """Serves the page until it is interrupted."""
    flags = parse_flags(arguments, AppFlags)
    from flax_pref.app.server import check_server

    check_server(flags)
    from flax_pref.compilation import set_up

    set_up()
    from flax_pref.app.server import serve

    serve(flags)
