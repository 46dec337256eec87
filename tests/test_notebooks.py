"""The notebooks: committed without outputs, run from top to bottom at the demo's size, and plain where they fail."""

import ast
import os
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_running_docs import command_problems, told

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
CHECKPOINTS = ("demo", "sd15", "sdxl")

each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def read(file, checkpoint="demo"):
    """A notebook with another checkpoint: the one change that its first cell of code asks for."""
    book = nbformat.read(file, as_version=4)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert first.source.startswith('CHECKPOINT = "demo"')
    first.source = f'CHECKPOINT = "{checkpoint}"'
    return book


def code(book):
    """The cells of code, without lines for IPython alone."""
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    return [re.sub(r"^( *)%.*$", r"\1pass", text, flags=re.MULTILINE) for text in cells]


def run(book, folder, monkeypatch):
    """Executes a notebook in a folder, on the CPU, with the command of this environment."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = NotebookClient(
        book,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
    )
    client.execute()


def printed(book):
    """What the cells have shown as text."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def pictures(book):
    """The kinds of the figures and pages that the cells have shown, by the number of the cell."""
    return {
        number: [kind for output in cell.get("outputs", []) for kind in output.get("data", {}) if kind != "text/plain"]
        for number, cell in enumerate(book.cells)
    }


@each
def test_a_notebook_is_committed_without_outputs(file):
    book = read(file)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not [cell.id for cell in cells if cell.outputs or cell.execution_count is not None]


@each
def test_a_notebook_imports_the_public_names_only(file):
    for text in code(read(file)):
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax_pref"))
            assert not (isinstance(node, ast.Import) and any("flax_pref." in alias.name for alias in node.names))


@each
def test_links_of_a_notebook_lead_somewhere(file):
    text = "\n".join(cell.source for cell in read(file).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        assert (file.parent / target).exists(), target


def commands_of(book):
    """The commands that a notebook runs, made by its own cell of settings."""
    install, settings, *rest = code(book)[1:]
    names = {"CHECKPOINT": re.search(r'"(\w+)"', code(book)[0])[1], "module": "dpo.safetensors"}
    exec(settings, names)
    for text in rest:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("run", "watch"):
                said = eval(compile(ast.Expression(node.args[0]), "cell", "eval"), names)
                yield (
                    said
                    if said.startswith("flax-pref")
                    else f"flax-pref train {said} --data runs/pairs --output runs/a"
                )
    del install


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@each
def test_every_command_of_a_notebook_is_understood(file, checkpoint):
    """Also those for checkpoints that nothing here runs."""
    commands = list(commands_of(read(file, checkpoint)))
    assert commands or file.stem == "draw"
    for command in commands:
        assert list(told(command_problems(shlex.split(command), None))) == [], command


@pytest.mark.program
@each
def test_a_notebook_runs_from_top_to_bottom_at_the_demo_s_size(file, tmp_path, monkeypatch):
    book = read(file)
    run(book, tmp_path, monkeypatch)
    shown = [kind for kinds in pictures(book).values() for kind in kinds]
    text = printed(book)
    if file.stem == "draw":
        assert shown.count("image/png") == 3  # the base, the row over w, and how far the images move
        assert re.search(r"w = 0: [\d.]+ s, w = 1: ", text)
    if file.stem == "train":
        assert shown.count("image/png") == 5  # curves and samples of two trainings, and the comparison
        assert "text/html" in shown  # the pairs
        assert {path.name for path in tmp_path.glob("runs/*/modules/*.safetensors")} >= {
            *("dpo.safetensors", "pos.safetensors", "neg.safetensors")
        }
    if file.stem == "evaluate":
        assert "text/html" in shown and (tmp_path / "runs" / "report" / "report.html").is_file()
        assert "24 pairs (prompt, seed) of 12 prompts" in text
    assert "rror" not in text


@pytest.mark.program
@each
def test_without_a_network_a_notebook_stops_with_one_line(file, tmp_path, monkeypatch):
    book = read(file, "sd15")
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")  # nobody answers
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(CellExecutionError):
        run(book, tmp_path, monkeypatch)
    (error,) = (output for cell in book.cells for output in cell.get("outputs", []) if output.output_type == "error")
    (said,) = error.traceback
    *_, reason = [line for line in [*printed(book).splitlines(), said] if "Stopped: " not in line and line.strip()]
    assert "the Hub cannot be reached" in reason and "\n" not in said.strip(), (reason, said)
