"""The command line: flags from a dataclass, one JSON line, one error line, exit codes."""

import dataclasses
import json

import pytest

from lowbit import cli


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = cli.field(cli.REQUIRED, "A model.")
    steps: int | None = cli.field(None, "Steps.")
    rate: float = cli.field(0.5, "Rate.")
    kind: str = cli.field("a", "Kind.", choices=("a", "b"))
    resume: bool = cli.field(False, "Resume.")

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"--rate is {self.rate}; it must be above 0")


def command(config):
    if config.model == "missing":
        raise FileNotFoundError("missing: no such\nfile")
    return dataclasses.asdict(config)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tool", *arguments])
    cli.run(command, Config)


@pytest.fixture(autouse=True)
def _same_checkout(monkeypatch):
    monkeypatch.setattr(cli, "_check_checkout", lambda main: None)


def test_flags_become_the_config_and_the_row_is_one_json_line(monkeypatch, capsys):
    run(monkeypatch, "--model=m", "--steps=3", "--rate=0.25", "--kind=b", "--resume")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    expected = {"model": "m", "steps": 3, "rate": 0.25, "kind": "b", "resume": True}
    assert json.loads(out) == expected


def test_two_commands_in_one_process_do_not_collide(monkeypatch, capsys):
    for _ in range(2):
        run(monkeypatch, "--model=m")
    assert json.loads(capsys.readouterr().out.splitlines()[1])["steps"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "model"),
        (("--model=m", "--unknown=1"), "unknown"),
        (("--model=m", "--kind=c"), "kind"),
        (("--model=m", "--steps=x"), "steps"),
        (("--model=m", "--rate=-1"), "--rate is -1.0"),
        (("--model=m", "stray"), "stray"),
        (("--model=missing",), "missing: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert words in captured.err


def test_help_names_every_flag_with_its_text(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for item in dataclasses.fields(Config):
        assert item.name in out
        assert item.metadata["help"] in out


def test_mixed_installations_are_refused(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr("lowbit.__file__", "/elsewhere/lowbit/__init__.py")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model=m")
    assert "two installations are mixed" in capsys.readouterr().err
