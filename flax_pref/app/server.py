"""Serves the page: checks what can be checked at once, loads the model, and waits."""

import errno
import importlib.util
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

from flax_pref.app.app_flags import AppFlags
from flax_pref.config import UserError


def check_server(flags: AppFlags) -> None:
    """Checks what a page needs besides a model; takes no time.

    Raises:
        UserError: gradio is not installed, or the port cannot be listened on.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, an extra; pip install 'flax-pref[app]'")
    try:
        family, _, _, _, address = socket.getaddrinfo(flags.host, flags.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no other one
            probe.bind(address)
    except socket.gaierror as error:
        raise UserError(
            f"--host {flags.host}: {error.strerror}; expected an address of this machine, e.g. 127.0.0.1"
        ) from error
    except PermissionError as error:
        raise UserError(f"--port {flags.port}: is reserved for the system; expected 1024 to 65535") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {flags.port}: is in use on {flags.host}; end the program that listens there, or choose "
                f"another one, e.g. --port {flags.port + 1 if flags.port < 65535 else 7860}"
            ) from error
        raise UserError(
            f"--host {flags.host}: {error.strerror}; expected an address of this machine, e.g. 127.0.0.1"
        ) from error


def serve(flags: AppFlags) -> None:
    """Loads the model and serves the page until SIGINT or SIGTERM.

    Raises:
        UserError, ValueError, OSError: the model cannot be loaded, or the port was taken meanwhile.
    """
    from flax_pref.app.studio import Studio
    from flax_pref.parallel.signals import stopped_by

    # Read when gradio is imported and when it starts: nothing is reported, and no version is asked for.
    os.environ.update({"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"})
    studio = Studio(flags)
    print(f"loading {studio.about}")
    studio.load()
    with (
        tempfile.TemporaryDirectory(prefix="flax_pref-app-") as folder,
        stopped_by(signal.SIGINT) as interrupted,
        stopped_by(signal.SIGTERM) as ended,
    ):
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "gradio")
        from flax_pref.app.page import open_page

        close, public = open_page(studio, Path(folder) / "images", flags)
        host = f"[{flags.host}]" if ":" in flags.host else flags.host
        print(f"open http://{host}:{flags.port} in a browser; Ctrl+C ends the page")
        if public:
            print(f"public, for everyone with the link: {public}")
        elif flags.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"note: everyone who reaches port {flags.port} of this machine can draw on it")
        try:
            while not (interrupted() or ended()):
                time.sleep(0.2)
        finally:
            studio.close()
            close()
