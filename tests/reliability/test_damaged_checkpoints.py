"""Files of weights and what stands beside them, damaged or hostile: refused in a line, or read as they were written.

Right means the tensors bit for bit, and for a run folder the same prediction, or that of the folder without the field that was
changed. A file of a PyTorch before 1.6 holds no checksum; that it says so is noted. Each attempt is made in a process of its
own, whose memory and time are measured.
"""

import functools
import io
import json
import logging
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import campaign

from groupmixformer import GroupMixFormer, Run, load_checkpoint
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import RunFolder

DATA = Path(__file__).parents[1] / "data"
MOST_MEMORY = 1500  # MB, of an attempt: a gigabyte is allowed by default
FILES = {"zip": "a.pth", "legacy": "b.pth", "safetensors": "model.safetensors", "last": "checkpoints/last.ckpt"}
FILES["bin"] = "pytorch_model.bin"


@functools.cache
def originals():
    """A folder with the weights of a small network in every form, and the weights."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model = GroupMixFormer(embed_dims=(10, 20), depths=(1, 1), mlp_ratios=(1, 1), num_classes=3)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    weights = model.state_dict()
    save_checkpoint(model, folder, ["cat", "dog", "cow"], {"input_size": (3, 64, 64)})
    (folder / "checkpoints").mkdir()
    torch.save({"model": weights, "epoch": 3}, folder / FILES["zip"])
    torch.save({"model": weights, "epoch": 3}, folder / FILES["legacy"], _use_new_zipfile_serialization=False)
    torch.save(weights, folder / FILES["bin"])
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    moments = {i: {"exp_avg": torch.zeros_like(tensor)} for i, tensor in enumerate(model.parameters())}
    last = {"pytorch-lightning_version": "2.6.6", "epoch": 2, "global_step": 9, "state_dict": state}
    torch.save(last | {"optimizer_states": [{"state": moments}]}, folder / FILES["last"])
    return folder, {name: tensor.clone() for name, tensor in weights.items()}


# Damage to bytes


def flip(rng, content):
    for _ in range(int(rng.integers(1, 9))):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return content


def flip_one(rng, content):
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return content


def truncate(rng, content):
    return content[: rng.integers(len(content))]


def delete(rng, content):
    start = rng.integers(len(content))
    del content[start : start + rng.integers(1, 65)]
    return content


def insert(rng, content):
    start = rng.integers(len(content))
    content[start:start] = rng.bytes(int(rng.integers(1, 65)))
    return content


def blank(rng, content):
    """A page that was never written."""
    start = int(rng.integers(len(content)))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    return content


def swap(rng, content):
    """Two pages in each other's place."""
    a, b = (int(place) // 256 * 256 for place in rng.integers(len(content) - 256, size=2))
    content[a : a + 256], content[b : b + 256] = content[b : b + 256], content[a : a + 256]
    return content


# Archives that were written anew


def members_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def zipped(members, compression):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return bytearray(file.getvalue())


def any_compression(rng):
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    return kinds[rng.integers(4)]


def rezip(rng, content):
    return zipped(members_of(content), any_compression(rng))


def shorten(rng, content):
    """A storage that is shorter, or longer, than the pickle says."""
    members = members_of(content)
    names = [name for name in members if "/data/" in name]
    name = names[rng.integers(len(names))]
    data = members[name]
    members[name] = data[: rng.integers(len(data))] if rng.random() < 0.7 else data + bytes(rng.integers(1, 99))
    return zipped(members, any_compression(rng))


def exchange(rng, content):
    """Two storages of other sizes under each other's names."""
    members = members_of(content)
    names = [name for name in members if "/data/" in name]
    while True:
        a, b = (names[i] for i in rng.integers(len(names), size=2))
        if len(members[a]) != len(members[b]):
            break
    members[a], members[b] = members[b], members[a]
    return zipped(members, any_compression(rng))


def lose(rng, content):
    members = members_of(content)
    names = [name for name in members if "/data/" in name or name.endswith("data.pkl")]
    del members[names[rng.integers(len(names))]]
    return zipped(members, any_compression(rng))


def bomb_member(rng, content):
    file = io.BytesIO(bytes(content))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        name = f"{archive.namelist()[0].partition('/')[0]}/data/999"
        with archive.open(name, "w", force_zip64=True) as member:
            for _ in range(128):
                member.write(bytes(1 << 24))
    return bytearray(file.getvalue())


def bomb_pickle(rng, content):
    members = members_of(content)
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = b"\x80\x02" + (b"}", b"]", b"(")[rng.integers(3)] * 40_000_000 + b"."
    return zipped(members, zipfile.ZIP_DEFLATED)


def bomb_bytes(rng, content):
    """A pickle that asks for two billion bytes."""
    members = members_of(content)
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x94\x35\x77\x85R."
    return zipped(members, any_compression(rng))


# Headers of safetensors


def header(rng, content):
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])
    names = [name for name in fields if name != "__metadata__"]
    one, two = (names[i] for i in rng.integers(len(names), size=2))
    entry, change = fields[one], int(rng.integers(9))
    if change == 0:
        entry["dtype"] = ("F64", "F16", "I32", "BOOL", "BF16", "nonsense", 5)[rng.integers(7)]
    elif change == 1:
        entry["shape"] = [[], [1 << 40], entry["shape"][::-1], [*entry["shape"], 1], [-1], "3", None][rng.integers(7)]
    elif change == 2:
        entry["data_offsets"] = fields[two]["data_offsets"]
    elif change == 3:
        entry["data_offsets"] = [int(place) for place in rng.integers(-9, len(content) * 2, size=2)]
    elif change == 4:
        fields[one], fields[two] = fields[two], fields[one]
    elif change == 5:
        del fields[one]
    elif change == 6:
        fields[f"{one}x"] = fields.pop(one)
    elif change == 7:
        fields[one] = (None, [], "text", 5, {})[rng.integers(5)]
    else:
        fields |= {f"more{i}": entry for i in range(200)}
    new = json.dumps(fields).encode()
    if rng.random() < 0.1:
        return bytearray(struct.pack("<Q", int(rng.integers(1 << 62))) + new + content[8 + length :])
    return bytearray(struct.pack("<Q", len(new)) + new + content[8 + length :])


# Files that say something else than they hold


def written(rng, kind, change):
    """Write the weights with some changed, in the form of `kind`."""
    weights = dict(originals()[1])
    names = [name for name in weights if weights[name].is_floating_point()]
    name = names[rng.integers(len(names))]
    weights[name] = change(weights[name].clone())
    file = io.BytesIO()
    if kind == "safetensors":
        import safetensors.torch

        return bytearray(safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}))
    content = {f"model.{name}": tensor for name, tensor in weights.items()} if kind == "last" else weights
    about = {"pytorch-lightning_version": "2", "state_dict": content} if kind == "last" else content
    torch.save(about, file, _use_new_zipfile_serialization=kind != "legacy")
    return bytearray(file.getvalue())


def bad_numbers(rng, kind):
    def change(tensor):
        tensor.view(-1)[rng.integers(tensor.numel())] = (float("nan"), float("inf"), -float("inf"))[rng.integers(3)]
        return tensor

    return written(rng, kind, change)


def expanded(rng, kind):
    """A classifier of 60 million classes, each with the same weights."""
    width = originals()[1]["head.fc.weight"].shape[1]
    wide = {"head.fc.weight": torch.ones(1).expand(60_000_000, width), "head.fc.bias": torch.ones(1).expand(60_000_000)}
    file = io.BytesIO()
    torch.save(originals()[1] | wide, file, _use_new_zipfile_serialization=kind != "legacy")
    return bytearray(file.getvalue())


def misshapen(rng, kind):
    return written(rng, kind, lambda tensor: tensor[None] if rng.random() < 0.5 else tensor.to(torch.int32))


BYTES = (flip_one, flip_one, flip, truncate, delete, insert, blank, swap)
ARCHIVES = (rezip, rezip, shorten, shorten, exchange, lose)
CONTENTS = (bad_numbers, misshapen)
BOMBS = [(kind, change) for kind in ("zip", "last", "bin") for change in (bomb_member, bomb_pickle, bomb_bytes, expanded)]
BOMBS += [("legacy", expanded)] * 3


def in_a_process(call):
    """Return what `call` returns in a process of its own, or what is wrong with its memory, time or end."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (24 << 30,) * 2)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                outcome = call()
            except Exception as error:
                outcome = campaign.refusal(error)
            taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            os.write(write, (outcome if taken < MOST_MEMORY else f"took {taken / 1000:.1f} GB").encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(int(campaign.MOST_SECONDS))
    with os.fdopen(read, "rb") as file:
        said = file.read().decode()
    status = os.waitpid(child, 0)[1]
    signal.alarm(0)
    return said or f"ended by signal {status}"


class Notes(logging.Handler):
    """Keeps what the package says."""

    def emit(self, record):
        self.said = True


def weights_are_right(path):
    notes = Notes()
    logging.getLogger("groupmixformer.weights").addHandler(notes)
    expected, found = originals()[1], load_checkpoint(path).state_dict()
    if all(torch.equal(found[name].view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8)) for name in expected):
        return "right"
    return "noted" if path.name == FILES["legacy"] and hasattr(notes, "said") else "wrong weights"


def attempt_weights(rng):
    kind = list(FILES)[rng.integers(len(FILES))]
    changes = [*BYTES, *CONTENTS]
    if kind in ("zip", "last", "bin"):
        changes += ARCHIVES
    if kind == "safetensors":
        changes += [header] * 6
    return attempt_file(rng, kind, changes[rng.integers(len(changes))])


def attempt_bombs(rng):
    kind, change = BOMBS[rng.integers(len(BOMBS))]
    return attempt_file(rng, kind, change)


def attempt_file(rng, kind, change):
    folder, _ = originals()
    whole = change in (*CONTENTS, expanded)
    content = change(rng, kind) if whole else change(rng, bytearray((folder / FILES[kind]).read_bytes()))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, FILES[kind])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if kind in ("safetensors", "bin", "last"):
            shutil.copyfile(folder / "config.json", Path(temporary, "config.json"))
        outcome = in_a_process(lambda: weights_are_right(path))
    return outcome if outcome in campaign.ALLOWED else f"{kind}, {change.__name__}: {outcome}"


# What stands beside the weights


WRONG = (None, "text", "", 0.003, float("nan"), float("inf"), -1, 10**30, 40000, True, [], ["text"], [None], {}, {"text": 1})


def places(values, above=()):
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*above, name)
        if isinstance(value, dict | list):
            yield from places(value, (*above, name))


def predicted(run):
    opened = Run.open(run)
    return json.dumps([opened.predict(DATA / "image.png", device="cpu").result, opened.class_names])


def json_is_right(run, expected, without):
    found = predicted(run)
    return "right" if found == expected or found == without() else "wrong prediction"


@functools.cache
def expected_of(task):
    return predicted(DATA / task)


def attempt_configs(rng):
    task = ("classification", "classification", "detection", "segmentation")[rng.integers(4)]
    with tempfile.TemporaryDirectory() as temporary:
        run = shutil.copytree(DATA / task, Path(temporary, "run"))
        choice = rng.random()
        if choice < 0.15:
            name = ("metrics.csv", "versions.json")[rng.integers(2)]
            original = (run / name).read_bytes()
            change = (flip, delete, truncate, insert)[rng.integers(4)]
            (run / name).write_bytes(change(rng, bytearray(original)))

            def look():
                folder = RunFolder(run)
                found = folder.metrics if name == "metrics.csv" else folder.versions
                values = [value for row in (found if isinstance(found, list) else [found]) for value in row.values()]
                return "right" if all(isinstance(v, float if name == "metrics.csv" else str) for v in values) else "wrong type"

            outcome, what = in_a_process(look), f"{name}, {change.__name__}"
        else:
            config = json.loads((run / "config.json").read_text())
            known = list(places(config))
            place, value = known[rng.integers(len(known))], WRONG[rng.integers(len(WRONG))]
            inner = config
            for part in place[:-1]:
                inner = inner[part]
            original = inner[place[-1]]
            if isinstance(original, str) and isinstance(value, str) and "names" in str(place):
                value = ["another type"]  # another name is a name
            inner[place[-1]] = value
            (run / "config.json").write_text(json.dumps(config))
            expected = expected_of(task)

            def without():
                inner.pop(place[-1])
                (run / "config.json").write_text(json.dumps(config))
                try:
                    return predicted(run)
                except (ValueError, FileNotFoundError):
                    return None

            if type(value) in (int, float) and isinstance(original, int | float) and not isinstance(original, bool):
                # A number in place of a number may be meant: it must be taken or refused.
                def accept():
                    predicted(run)
                    return "right"

                outcome = in_a_process(accept)
            else:
                outcome = in_a_process(lambda: json_is_right(run, expected, without))
            what = f"{task} {'.'.join(map(str, place))} = {value!r}"
    return outcome if outcome in campaign.ALLOWED else f"{what}: {outcome}"


@pytest.mark.parametrize(
    ("attempt", "count"), [(attempt_weights, 12), pytest.param(attempt_configs, 12, marks=pytest.mark.slow)]
)
def test_damaged_checkpoints(attempt, count):
    assert campaign.run(attempt, count, seed=1)["failures"] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    campaign.main({"weights": (attempt_weights, 1500), "bombs": (attempt_bombs, 40), "configs": (attempt_configs, 500)})
