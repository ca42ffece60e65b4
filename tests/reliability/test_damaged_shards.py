"""Shards, whole and damaged: every sample is read as it was written, or named, or the shard is refused in one line.

python tests/reliability/test_damaged_shards.py --count 100 --out shards.json

Damage that changes no sample must change nothing; other damage may cost samples, each of which is named. A label is one of the
classes', and as many samples come as `_info.json` says, whatever else happens.
"""

import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign
import numpy as np
import pytest
from PIL import Image

from groupmixformer.data.shards import write_shards
from groupmixformer.data.streaming import open_stream

COUNT, PER_SHARD = 12, 4
Members = list[tuple[tarfile.TarInfo, bytes]]


def colour(number: int) -> tuple[int, int, int]:
    return number * 20, 255 - number * 20, number


def written(folder: Path) -> Path:
    """Twelve images of one colour each, of the classes 0 and 1 in turns, in three shards."""
    files = []
    for number in range(COUNT):
        path = folder / "images" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (33, 33), colour(number)).save(path)
        files.append((str(path), number % 2))
    write_shards(
        folder, {"train": files, "validation": files}, ["a", "b"], folder / "shards", PER_SHARD, 0, 1, lambda done, *_: done
    )
    return folder / "shards"


def members_of(path: Path) -> Members:
    with tarfile.open(path) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def repack(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            if member.isreg():
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, len(content)
    return made, content


def renamed(members: Members, new: Callable[[str], str]) -> Members:
    for info, _ in members:
        info.name = new(info.name)
    return members


def relabelled(members: Members, rng: np.random.Generator) -> Members:
    label = [b"2", b"-1", b"99999999999999999999", b"", b"one", b"1.0", b"\xff", b"nan", b"0 1"][int(rng.integers(9))]
    which = int(rng.integers(PER_SHARD)) * 3
    labels = [i for i, (info, _) in enumerate(members) if info.name.endswith(".cls")]
    place = labels[which // 3]
    members[place] = (members[place][0], label)
    return members


def without(members: Members, ending: str) -> Members:
    drop = next(i for i, (info, _) in enumerate(members) if info.name.endswith(ending))
    return members[:drop] + members[drop + 1 :]


def doubled(members: Members, rng: np.random.Generator) -> Members:
    copy = int(rng.integers(len(members)))
    info, content = members[copy]
    at = copy + 1 if rng.random() < 0.5 else int(rng.integers(len(members) + 1))
    return [*members[:at], member(info.name, content), *members[at:]]


# That change no sample.
HARMLESS: list[Callable[[Members, np.random.Generator], Members]] = [
    lambda members, rng: members,
    lambda members, rng: renamed(members, lambda name: f"/etc/{name}"),
    lambda members, rng: renamed(members, lambda name: f"../../{name}"),
    lambda members, rng: renamed(members, lambda name: f"./a folder/{name}"),
    lambda members, rng: [member("._00.png", b"left"), member("__MACOSX/._00.cls", b"left"), *members],
    lambda members, rng: [*members, member(".DS_Store", b"left"), member("Thumbs.db", b"left")],
    lambda members, rng: [member("readme.md", b"text"), member("folder", kind=tarfile.DIRTYPE), *members],
    lambda members, rng: [member("0/x.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), *members],
    lambda members, rng: [*members, member("zz.png", kind=tarfile.FIFOTYPE), member("zy.png", kind=tarfile.CHRTYPE)],
]
# That cost samples, which must be named, or the shard.
HARMFUL: list[Callable[[Members, np.random.Generator], Members]] = [
    relabelled,
    doubled,
    lambda members, rng: without(members, ".cls"),
    lambda members, rng: without(members, ".png"),
    lambda members, rng: members[: int(rng.integers(len(members)))],
    lambda members, rng: [members[i] for i in rng.permutation(len(members))],
    lambda members, rng: [*members, member("99.png", members[0][1] or members[1][1]), member("99.cls", b"1")],
    lambda members, rng: [(info, rng.bytes(40) if info.name.endswith(".png") else content) for info, content in members],
]


def edited(info: Any, rng: np.random.Generator) -> None:
    """Make a field of `_info.json` something else."""
    split = info["splits"]["validation"]
    place, name = [(info, "class_names"), (info, "splits"), *((split, key) for key in split if key != "name")][
        int(rng.integers(5))
    ]
    values = [
        None,
        3,
        -1,
        "text",
        [],
        {},
        [1],
        [None] * 3,
        1e308,
        True,
        {"validation": []},
        ["x.tar"] * 3,
        [4, 4, -4],
        [4.5, 4, 3.5],
    ]
    if rng.random() < 0.2:
        del place[name]
    else:
        place[name] = values[int(rng.integers(len(values)))]


def damaged_file(content: bytes, rng: np.random.Generator) -> bytes:
    kind = int(rng.integers(4))
    if kind == 0:
        return content[: int(rng.integers(len(content)))]
    if kind == 1:
        return rng.bytes(2000)
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    bits[rng.integers(len(bits) if kind == 2 else 4096, size=int(rng.integers(1, 20)))] ^= 1
    return np.packbits(bits).tobytes()


def look(folder: Path, compare: bool) -> str:
    """Read the stream for evaluation."""
    stream = open_stream("wds/", str(folder), "validation")
    found = list(stream)
    if len(found) != COUNT:
        return f"gave {len(found)} samples"
    problems = [problem for *_, problem in found if problem]
    if any("\n" in problem for problem in problems):
        return "a problem of several lines"
    for number, (image, label, problem) in enumerate(found):
        if problem:
            continue
        if label not in (0, 1):
            return f"label {label} without a word"
        if compare and (label, image.getpixel((5, 5))) != (number % 2, colour(number)):
            return f"sample {number} is another: {label}, {image.getpixel((5, 5))}"
    return "noted" if problems else "right"


def attempt(rng: np.random.Generator) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = written(Path(name))
        path, draw = folder / f"validation-{int(rng.integers(3)):06d}.tar", rng.random()
        harmless = draw < 0.3
        if harmless:
            repack(path, HARMLESS[int(rng.integers(len(HARMLESS)))](members_of(path), rng))
            if rng.random() < 0.2:
                path.write_bytes(gzip.compress(path.read_bytes()))
        elif draw < 0.65:
            repack(path, HARMFUL[int(rng.integers(len(HARMFUL)))](members_of(path), rng))
        elif draw < 0.85:
            path.write_bytes(damaged_file(path.read_bytes(), rng))
        else:
            place = folder / "_info.json"
            info = json.loads(place.read_text())
            edited(info, rng)
            place.write_text(json.dumps(info))
        outcome = campaign.apart(lambda: look(folder, compare=draw < 0.65))
    return f"{outcome}, but no sample is damaged" if harmless and outcome != "right" else outcome


CAMPAIGNS = {"shards": (attempt, 100)}


@pytest.mark.slow
def test_damaged_shards():
    result = campaign.run(attempt, 20)
    assert not result["failures"]
    assert result["counts"]["right"] and result["counts"]["refused"]


if __name__ == "__main__":
    campaign.main(CAMPAIGNS)
