"""The classes of a model and those of a data set, matched by name."""

from collections import Counter
from collections.abc import Sequence
from unicodedata import normalize


def few(names: Sequence[str], most: int = 5) -> str:
    """List names in a message: the first ones, and how many there are if that is not all."""
    return ", ".join(names[:most]) + (f", ... ({len(names):,})" if len(names) > most else "")


def differences(first: Sequence[str], second: Sequence[str], one: str, other: str) -> str:
    """Say in a line which names only one of two lists has; nothing if both have the same.

    Args:
        first: Names of classes.
        second: Names of others.
        one: What to call what has the first.
        other: What to call what has the second.
    """
    shared = set(first) & set(second)
    alone = {owner: [name for name in names if name not in shared] for owner, names in ((one, first), (other, second))}
    return "; ".join(f"only {owner} has {few(names)}" for owner, names in alone.items() if names)


def match_classes(model: Sequence[str], data: Sequence[str], where: str) -> list[int]:
    """Find the classes of a data set among those of a model, by name.

    The order may differ, and the model may have more classes. Names are compared in Unicode's composed form, as file systems
    write é in one character or in two.

    Args:
        model: Names of its classes, in the order of its outputs.
        data: Names of its classes, in the order of its labels.
        where: What to call the data in a message.

    Returns:
        For each class of the data, its place among the model's.

    Raises:
        ValueError: If the model lacks a class of the data, with the names that only one of them has; or if the lists differ and
            a name stands for two classes.
    """
    model, data = ([normalize("NFC", name) for name in names] for names in (model, data))
    if model == data:
        return list(range(len(data)))
    if not set(data) <= set(model):
        raise ValueError(
            f"{where}: has other classes than the model: {differences(data, model, 'the data', 'the model')}; expected classes "
            "of the model, in any order: rename those of the data that mean the same"
        )
    for owner, names in (("the model", model), (where, data)):
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{owner}: has several classes of the name {few(repeated)}: they cannot be matched by name")
    return [model.index(name) for name in data]
