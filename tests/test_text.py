"""Text of users: never markup, printed whatever the terminal can show, and strict JSON."""

import ast
import io
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from groupmixformer.cli import common
from groupmixformer.cli.common import LOGGER, Notes, show
from groupmixformer.cli.main import main
from groupmixformer.files import printable, to_json, write_file, write_rows
from groupmixformer.run_folder import RunFolder

SOURCE = Path(__file__).parents[1] / "src" / "groupmixformer"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\u202egpj.exe", r"\u202egpj.exe"),  # would be read from the right
        ("\udcff.jpg", r"\udcff.jpg"),  # a byte of a file name that is no UTF-8
        ("\u2028\x85", r"\u2028\x85"),
        ("名前 кот 😀 שלום é\xa0\u3000", "名前 кот 😀 שלום é\xa0\u3000"),
        ("👨\u200d👩", "👨\u200d👩"),  # one emoji
        ("under $5 <b> [bold] a|b", "under $5 <b> [bold] a|b"),
    ],
)
def test_text_does_nothing_to_a_terminal(text, shown):
    assert printable(text) == shown


def test_no_json_is_written_but_by_to_json():
    """What is left packs records in memory and takes a recipe apart."""
    calls = {
        f"{path.relative_to(SOURCE)}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps") and getattr(node.value, "id", "") == "json"
    }
    assert calls <= {"files.py", "tasks/detection/data.py", "training/recipe.py", "training/resume.py"}


def test_json_has_no_nan():
    content = {"a": math.nan, "b": [1.5, math.inf, (-math.inf,)], "c": {"d": float("nan")}, "名": "\x1b"}
    text = to_json(content)
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.5, None, [None]], "c": {"d": None}, "名": "\x1b"}
    assert text.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_an_encoding_without_the_characters_loses_no_result(encoding, monkeypatch):
    def shown(*result):
        bytes_ = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_, encoding=encoding))
        monkeypatch.setattr("groupmixformer.cli.main.parse", lambda argv: ("models", [], {}))
        monkeypatch.setattr(
            "groupmixformer.cli.main.COMMANDS", {"models": type("", (), {"function": staticmethod(lambda: show(*result))})}
        )
        assert main(["models"]) == 0
        sys.stdout.flush()
        return bytes_.getvalue().decode(encoding)

    text = shown({}, False, "名前 90 %\n\x1b[31m")
    assert text.splitlines() == ["名前 90 %" if encoding == "utf-8" else r"\u540d\u524d 90 %", r"\x1b[31m"]
    assert json.loads(shown({"class": "名前"}, True, "")) == {"class": "名前", "notes": []}


def test_a_reader_that_left_ends_a_command_quietly(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["train", "digits", "--print"]) == 1
    assert capfd.readouterr().err == ""


def test_notes_are_printed_as_they_come_and_told_in_json(capsys):
    with Notes("predict"):
        LOGGER.warning("skipped 100 % of \x1b[31m.jpg")
        assert capsys.readouterr().err == "gmf predict: skipped 100 % of \\x1b[31m.jpg\n"
        show({"run": "x"}, True, "")
    assert json.loads(capsys.readouterr().out) == {"run": "x", "notes": ["skipped 100 % of \x1b[31m.jpg"]}
    assert not LOGGER.handlers


def test_notes_without_end_take_no_memory_without_end(monkeypatch, capsys):
    monkeypatch.setattr(common, "MOST_NOTES", 2)
    with Notes("serve"):
        for number in range(5):
            LOGGER.warning("note %s", number)
        assert capsys.readouterr().err.count("\n") == 5
        show({}, True, "")
    assert json.loads(capsys.readouterr().out) == {"notes": ["note 0", "note 1", "and 3 more, which were printed"]}


def test_errors_show_no_control_characters(capsys):
    assert main(["predict", "gone\x1b[2J\n", "image.png"]) == 1
    assert main(["predict\x1b[2J"]) == 2
    assert main(["models", "--js\x1bon"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\n") == 3


def test_home_is_expanded_where_no_shell_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs/x").path == tmp_path / "runs" / "x"
    assert main(["predict", "~/runs/x", "image.png"]) == 1
    assert f"{tmp_path}/runs/x" in capsys.readouterr().err
    assert main(["convert", "~/gone.pth", "--out=~/small"]) == 1
    assert f"{tmp_path}/gone.pth" in capsys.readouterr().err


def test_bytes_of_file_names_that_are_no_text_are_written_as_escapes(tmp_path):
    write_file(tmp_path / "unreadable.txt", "a\udcff.jpg")
    assert (tmp_path / "unreadable.txt").read_text() == r"a\udcff.jpg"
    write_rows(tmp_path / "rows.csv", [{"class": 'a,b\n"c"', "images": 1}])
    assert (tmp_path / "rows.csv").read_bytes() == b'class,images\r\n"a,b\n""c""",1\r\n'


STARTED = """
import sys
sys.argv[0] = "gmf"
from groupmixformer.cli.main import main
"""


def started_as_gmf(code, encoding="utf-8"):
    """What a process prints that was started by the name gmf."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", STARTED + code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_wrong_usage_need_no_torch():
    code = """
codes = [main(argv) for argv in (["--help"], ["predict", "--help"], ["train", "--help"], ["train", "digits", "--help"])]
codes += [main(argv) for argv in (["predictt"], ["eval", "x", "--jsn"], ["train", "digits", "--lrr", "1"], ["train", "digit"])]
assert codes == [0] * 4 + [2] * 4, codes
assert not {"torch", "timm", "numpy", "matplotlib"} & set(sys.modules)
"""
    assert "gmf predict" in started_as_gmf(code)


@pytest.mark.slow
def test_a_process_prints_what_its_terminal_can_show_and_its_reader_may_leave(tmp_path):
    image = tmp_path / "名前\x1b[31m.png"
    Image.new("RGB", (40, 40)).save(image)
    command = [sys.executable, "-c", STARTED + "sys.exit(main(sys.argv[1:]))"]
    command += ["predict", str(Path(__file__).parent / "data" / "classification"), str(image)]
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    for environment in ({**plain, "PYTHONIOENCODING": "ascii"}, plain, {"PYTHONIOENCODING": "cp1252"}):
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment}, check=False)
        assert done.returncode == 0, done.stderr
        assert rb"\x1b[31m.png: 2 53.3%" in done.stdout
        assert (rb"\udce5\udc90\udc8d" if "LANG" in environment else rb"\u540d\u524d") in done.stdout  # as Python decodes names
    shell = f"{shlex.join(command)} | true"
    assert subprocess.run(shell, shell=True, capture_output=True, check=False).stderr == b""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["groupmixformer.run", "groupmixformer.training.module", "groupmixformer.bench.side_by_side"])
def test_the_variants_are_registered_before_a_command_needs_them(first):
    code = f"""
assert "torch" not in sys.modules
import {first}, timm
print(timm.is_model("groupmixformer_small"))
"""
    assert started_as_gmf(code) == "True\n"
