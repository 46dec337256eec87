import dataclasses
import importlib
import json
from pathlib import Path
from typing import Literal

import pytest

from flax_pref.config import CONFIGS, UserError, check_output_folder, dump_config, load_config, run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    steps: int = 3
    rate: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    training: Training = Training()
    w: tuple[float, ...] = (1.0, 2.0)
    weights: tuple[float, ...] = ()
    output: Path = Path("runs/x")
    quick: bool = False
    solver: Literal["unipc", "ddim", "euler"] | None = None

    def __post_init__(self):
        if any(w != w for w in self.w):
            raise ValueError(f"w must be finite, got {self.w}")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(f"from {__name__} import Config, Training\nconfig = Config(training=Training(steps=7))\n")
    return path


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def test_flags_change_what_the_file_says(file):
    assert load_config([str(file)], Config) == Config(training=Training(steps=7))
    changed = load_config([str(file), "--quick", "--w", "3", "--output", "there"], Config)
    assert changed == Config(training=Training(steps=7), quick=True, w=(3.0,), output=Path("there"))


MISTAKES = {
    "no file": ([], "no config file; usage: python -m"),
    "a flag first": (["--quick"], "no config file; usage: python -m"),
    "a missing file": (["{folder}/smal.py"], "smal.py: no such config file; {folder} has small.py"),
    "a missing folder": (["{folder}/none/x.py"], "no such config file; there are no config files in {folder}/none"),
    "an unknown choice": (["{file}", "--solver", "eule"], "Expected one of ddim, euler, unipc; see"),
    "an unknown field": (["{file}", "--training.step", "4"], "perhaps you meant --training.steps"),
    "a word for a number": (["{file}", "--training.steps", "many"], "--training.steps"),
    "a number that is not finite": (
        ["{file}", "--training.rate", "inf"],
        "--training.rate inf: expected a finite number",
    ),
    "one among several": (["{file}", "--weights", "1", "-inf"], "--weights -inf: expected a finite number"),
    "a w that is not finite": (["{file}", "--w", "nan"], "w must be finite, got (nan,)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, file, capsys):
    arguments, message = MISTAKES[mistake]
    names = {"file": file, "folder": file.parent}
    with pytest.raises(SystemExit) as exit:
        load_config([argument.format(**names) for argument in arguments], Config)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message.format(**names) in printed.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "defines no name `config`"),
        ("config = 3", "config is a int, but"),
        ("x = 1\nconfig = undefined", ":2: NameError: name 'undefined' is not defined"),
        ("config = (", ":1: SyntaxError"),
        ("from {module} import Config\nconfig = Config(stepz=3)", ":2: TypeError"),
    ],
)
def test_a_file_that_is_no_config_is_one_line_with_its_place(content, message, file, capsys):
    file.write_text(content.format(module=__name__))
    with pytest.raises(SystemExit) as exit:
        load_config([str(file)], Config)
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed and str(file) in printed


def test_help_describes_the_fields(file, capsys):
    with pytest.raises(SystemExit) as exit:
        load_config([str(file), "--help"], Config)
    assert exit.value.code == 0
    assert "--training.steps INT" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_without_a_config_shows_how_to_call_the_program_and_its_configs(file, flag, tmp_path, capsys, monkeypatch):
    for name, content in {
        "mine": f'"""Small steps.\n\nMore."""\nfrom {__name__} import Config\nconfig = Config()\n',
        "other": '"""Of another program."""\nconfig = 3\n',
        "broken": "config = (",
    }.items():
        (tmp_path / "configs" / "demo").mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / "demo" / f"{name}.py").write_text(content)
    monkeypatch.setattr("flax_pref.config.CONFIGS", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        load_config([flag], Config)
    printed = capsys.readouterr()
    assert exit.value.code == 0 and printed.err == ""
    assert "CONFIG.py [--FIELD VALUE ...]" in printed.out and "  configs/demo/mine.py  Small steps.\n" in printed.out
    assert "other.py" not in printed.out and "broken.py" not in printed.out
    monkeypatch.setattr("flax_pref.config.CONFIGS", tmp_path / "none")
    with pytest.raises(SystemExit):
        load_config([flag], Config)
    assert f"no configs of this program in {tmp_path / 'none'}" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["modules", "encode", "base", "demo", "study", "plan"])
def test_help_of_every_program_with_configs_lists_them(program, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    module = importlib.import_module(f"train.{program}")
    with pytest.raises(SystemExit) as exit:
        module.main(["--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    listed = {line.split()[0] for line in printed.splitlines() if line.startswith("  configs/")}
    expected = {
        "modules": {f"configs/sd15/{name}.py" for name in ("dpo", "modules", "tailorpo")}
        | {"configs/demo/tailorpo.py"},
        "encode": {"configs/demo/encode.py"}
        | {f"configs/{name}/{file}.py" for name in ("sd15", "sdxl") for file in ("encode_pick_a_pic", "encode_small")}
        | {f"configs/sd15/encode_{name}.py" for name in ("image_reward_db", "pick_a_pic_v1")}
        | {f"configs/sdxl/encode_{name}.py" for name in ("hpdv3", "open_image_preferences")},
        "base": {"configs/demo/base.py"},
        "demo": {"configs/demo/demo.py"},
        "study": {"configs/demo/study.py"},
        "plan": {"configs/sdxl/dpo.py", "configs/demo/encode.py"},
    }[program]
    assert expected <= listed if program in ("modules", "plan") else expected == listed
    assert program != "plan" or "--topology" in printed


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("a\nb"), 1), (ValueError("c"), 1), (FileNotFoundError("d"), 1), (KeyboardInterrupt(), 130)],
)
def test_a_program_ends_a_user_s_mistake_in_one_line(error, status, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])

    def main(arguments):
        raise error

    assert run_main(main) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])

    def main(arguments):
        raise KeyError("defect")

    with pytest.raises(KeyError):
        run_main(main)


def test_an_output_folder_is_made_and_left_empty(tmp_path):
    folder = check_output_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and list(folder.iterdir()) == []


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_an_output_folder_that_cannot_be_written_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into this folder") as error:
        check_output_folder(tmp_path / place)
    assert place in str(error.value)


def test_a_bucket_is_no_output_folder_and_no_folder_of_that_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^gs://bucket/run: .* mount the bucket .*gcsfuse") as error:
        check_output_folder(Path("gs://bucket/run"))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_the_config_of_a_run_is_recorded(tmp_path):
    dump_config(dataclasses.asdict(Config()), tmp_path / "config.json")
    recorded = json.loads((tmp_path / "config.json").read_text())
    training = {"steps": 3, "rate": None}
    values = {"w": [1.0, 2.0], "weights": [], "output": "runs/x", "quick": False, "solver": None}
    assert recorded == {"training": training, **values}


# ----------------------------------------------------------------------------------------------------------------------
# Settings that no run can have, of the programs as they are


WRONG = {
    "modules": [
        *(["--seed", "-1"], ["--seed", "4294967296"], ["--steps", "0"], ["--input.batch-size", "0"]),
        *(["--accumulation", "3"], ["--optimizer.learning-rate", "nan"], ["--optimizer.learning-rate", "-1e-5"]),
        *(["--optimizer.weight-decay", "nan"], ["--optimizer.epsilon", "inf"], ["--optimizer.name", "adam"]),
        *(["--checkpoints.every", "0"], ["--checkpoints.keep", "0"], ["--export.every", "0"], ["--profile.steps", "0"]),
        *(["--samples.steps", "0"], ["--samples.seed", "-1"], ["--method.bet", "3"], ["--latents", "means"]),
    ],
    "encode": [["--encoding.size", "0", "64"], ["--max-drop-share", "nan"], ["--source.layout", "csv"]],
    "base": [["--seed", "-1"], ["--diffusion.steps", "0"], ["--layout.learning-rate", "nan"], ["--examples", "0"]],
    "demo": [
        ["--seed", "-1"],
        ["--dpo.steps", "0"],
        ["--dpo.batch-size", "0"],
        ["--sampling-steps", "0"],
        ["--rank", "0"],
        ["--training-seed", "-1"],
        ["--generators", "cleen"],
        ["--images", "5"],
        ["--tuned-scales", "nan"],
        ["--choice", "max"],
    ],
    "study": [["--only", "mian"], ["--demo.rank", "0"]],
}


@pytest.mark.parametrize(
    ("program", "flags"), [(name, flags) for name, wrong in WRONG.items() for flags in wrong], ids=str
)
def test_a_setting_that_no_run_can_have_is_refused_before_anything_is_done(
    program, flags, capsys, monkeypatch, tmp_path
):
    module = importlib.import_module(f"train.{program}")
    file = CONFIGS / "demo" / f"{program}.py"
    with pytest.raises(SystemExit) as exit:
        module.main([str(file), "--output", str(tmp_path / "run"), *flags])
    assert exit.value.code == 2 and not (tmp_path / "run").exists()
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert flags[0].rpartition(".")[2].strip("-").replace("-", "_") in told.replace("-", "_")
