"""The classes of a model and of a data set are matched by name, and what was not seen of them is said before training."""

import pytest

from groupmixformer.data.classes import differences, match_classes

MODEL = ["apple", "lime", "plum"]


@pytest.mark.parametrize(
    ("data", "places"),
    [
        (MODEL, [0, 1, 2]),
        (["plum", "apple", "lime"], [2, 0, 1]),
        (["plum"], [2]),
        (["lime", "apple"], [1, 0]),
    ],
)
def test_classes_are_found_by_name(data, places):
    assert match_classes(MODEL, data, "fruit") == places


def test_a_name_is_the_same_however_its_accents_are_written():
    assert match_classes(["e\u0301te\u0301", "hiver"], ["hiver", "\u00e9t\u00e9"], "saisons") == [1, 0]


def test_equal_lists_may_repeat_a_name_as_imagenet_does():
    assert match_classes(["crane", "crane"], ["crane", "crane"], "birds") == [0, 1]
    with pytest.raises(ValueError, match="the model: has several classes of the name crane"):
        match_classes(["crane", "crane", "gull"], ["gull", "crane"], "birds")
    with pytest.raises(ValueError, match="birds: has several classes of the name gull"):
        match_classes(["crane", "gull"], ["gull", "gull"], "birds")


def test_other_classes_are_refused_in_a_line_with_what_differs():
    with pytest.raises(ValueError, match="fruit: has other classes") as raised:
        match_classes(MODEL, ["lime", "plum", "zapple"], "fruit")
    assert "only the data has zapple; only the model has apple;" in str(raised.value)
    assert "\n" not in str(raised.value)
    many = [str(i) for i in range(1000)]
    with pytest.raises(ValueError, match=r"only the data has 0, 1, 2, 3, 4, \.\.\. \(1,000\); only the model has apple, lime"):
        match_classes(MODEL, many, "numbers")


def test_differences_name_both_sides():
    assert differences(["a", "b"], ["b", "c"], "the run", "the data") == "only the run has a; only the data has c"
    assert differences(["a", "b"], ["b", "a"], "the run", "the data") == ""
