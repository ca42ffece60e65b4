"""Files of users: read with their types checked; JSON that any parser reads."""

import json
import math

import pytest

from groupmixformer.files import Fields, read_json, read_text, to_json

RECORD = {
    "id": 3,
    "name": "a",
    "whole": 2.0,
    "crowd": 0,
    "size": [3, 32, 32],
    "cfg": {"mean": [0.5]},
    "all": [{"x": 1}],
    "no": None,
}


def test_fields_are_returned_with_their_types():
    fields = Fields(RECORD, "a.json")
    assert fields.integer("id", 0, 9) == 3
    assert type(fields.integer("whole")) is int
    assert fields.text("name") == fields.choice("name", ["a", "b"]) == "a"
    assert fields.flag("crowd") is False
    assert fields.integers("size", length=3, low=1) == [3, 32, 32]
    assert fields.object("cfg").numbers("mean", low=0, high=1) == [0.5]
    assert [one.integer("x") for one in fields.objects("all")] == [1]
    assert fields.text("missing", default="b") == "b"
    assert fields.number("no", default=None) is None


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda f: f.integer("name"), 'a.json: name is "a", expected an integer'),
        (lambda f: f.integer("id", 4, 9), "a.json: id is 3, expected an integer from 4 to 9"),
        (lambda f: f.integer("missing"), "a.json: has no missing, expected an integer"),
        (lambda f: f.integer("no"), "a.json: no is null, expected an integer"),
        (lambda f: f.flag("name"), 'a.json: name is "a", expected true, false, 1 or 0'),
        (lambda f: f.flag("size"), "a.json: size is [3, 32, 32], expected true, false, 1 or 0"),
        (lambda f: f.choice("name", ["b", "c"]), 'a.json: name is "a", expected one of b, c'),
        (lambda f: f.integers("size", length=2), "a.json: size is [3, 32, 32], expected a list of 2 integers"),
        (lambda f: f.texts("size"), "a.json: size is [3, 32, 32], expected a list of texts"),
        (
            lambda f: f.object("cfg").numbers("mean", low=1),
            "a.json: cfg: mean is [0.5], expected a list of finite numbers of at least 1",
        ),
        (lambda f: f.objects("all")[0].text("x"), "a.json: all[0]: x is 1, expected a text"),
        (lambda f: f.objects("size"), "a.json: size[0]: is 3, expected an object with fields"),
        (lambda f: Fields([], "b.json"), "b.json: is [], expected an object with fields"),
    ],
)
def test_a_wrong_field_is_named_with_what_came_and_what_is_expected(read, said):
    with pytest.raises(ValueError, match=":") as error:
        read(Fields(RECORD, "a.json"))
    assert str(error.value) == said


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", None, [1]])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="expected a finite number"):
        Fields({"x": value}, "a.json").number("x")
    with pytest.raises(ValueError, match="expected an integer"):
        Fields({"x": value}, "a.json").integer("x")


def test_json_is_strict_and_numbers_that_are_not_finite_are_null():
    text = to_json({"a": math.nan, "b": [1.5, -math.inf, (math.inf,)], "c": {"d": 1}})
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None,
        "b": [1.5, None, [None]],
        "c": {"d": 1},
    }


def test_texts_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"{", b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: ") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "missing")
