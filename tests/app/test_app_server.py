"""What `flax-pref app` refuses before it serves anything: one line each."""

import importlib.util
import re
import socket
from pathlib import Path

import pytest
from training.tiny import tiny_checkpoint

import flax_pref
from flax_pref.cli import command


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def refused(capsys, *arguments):
    """The one line of `flax-pref app ...`, which ends with status 1."""
    assert command.main(["app", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and "in a browser" not in printed.out
    return printed.err


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(capsys, "--model", "nowhere/at-all", "--port", str(port))
    assert f"--port {port}: is in use on 127.0.0.1; end the program that listens there, or choose" in said


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host, capsys):
    said = refused(capsys, "--model", "demo", "--host", host, "--port", free_port())
    assert f"--host {host}: " in said and "expected an address of this machine, e.g. 127.0.0.1" in said


def test_a_missing_extra_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert "needs gradio, an extra; pip install 'flax-pref[app]'" in refused(capsys, "--model", "demo")


def test_a_model_or_module_that_is_not_there_is_named(capsys, tmp_path):
    port = ("--port", free_port())
    assert "nowhere: " in refused(capsys, "--model", str(tmp_path / "nowhere"), *port)
    missing = f"dpo={tmp_path}/dpo.safetensors"
    assert "dpo.safetensors: " in refused(capsys, "--model", "demo", "--module", missing, *port)
    assert "--rule cpgd: needs modules that are not given" in refused(
        *(capsys, "--model", "demo", "--rule", "cpgd", "--w", "4", *port)
    )
    assert "--rule cfg has no use for --w" in refused(capsys, "--model", "demo", "--w", "4", *port)
    assert "--attention flash: is a kernel for TPUs" in refused(
        *(capsys, "--model", "demo", "--attention", "flash", *port)
    )
    assert "--w many: " in refused(capsys, "--model", "demo", "--w", "many", *port)
    (tmp_path / "text.safetensors").write_text("no weights")
    assert "text.safetensors: " in refused(
        *(capsys, "--model", str(tiny_checkpoint(tmp_path / "tiny", "sd15"))),
        *("--module", f"dpo={tmp_path}/text.safetensors", *port),
    )


def test_gradio_is_imported_only_where_the_page_is_made():
    importing = re.compile(r"^\s*(import|from) (gradio|flax_pref\.app\.page)\b", re.MULTILINE)
    package = Path(flax_pref.__file__).parent
    found = {
        str(file.relative_to(package)): match[0]
        for file in package.rglob("*.py")
        for match in importing.finditer(file.read_text())
    }
    assert set(found) == {"app/page.py", "app/server.py"}
    assert found["app/server.py"].startswith("        "), "within the function that serves"
