"""Streams: every sample once over all processes and workers, in every epoch another order, whatever the images are like."""

import gc
import io
import itertools
import json
import pickle
import re
import shutil
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset
from torch.utils.data import DataLoader

from groupmixformer.cli.main import main
from groupmixformer.data import sources, streaming
from groupmixformer.data.shards import write_shards
from groupmixformer.data.streaming import open_stream
from groupmixformer.tasks.classification.data import classification_transform
from groupmixformer.training.recipe import Augmentation

CLASSES = {"1": 19, "2": 17, "10": 11}  # images for training: 47 in all, which nothing here divides; timm's order
HELD_OUT = 7  # of each class
SHARES = [  # processes and workers of each
    pytest.param(*share, marks=[pytest.mark.slow] * (share not in ((1, 0), (3, 0), (2, 2))))
    for share in itertools.product((1, 2, 3), (0, 1, 2))
]


def flat(image):
    return torch.tensor(np.asarray(image)).flatten().float()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    images, labels = load_digits(return_X_y=True)
    for digit, (name, count) in enumerate(CLASSES.items()):
        for i, pixels in enumerate(images[labels == digit][: count + HELD_OUT].reshape(-1, 8, 8)):
            folder = root / ("train" if i < count else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def images(photos):
    """What each split holds: pixels and name of the class, all different."""
    found = {
        split: Counter(
            (tuple(flat(Image.open(path).convert("RGB")).tolist()), path.parent.name)
            for path in (photos / folder).rglob("*.png")
        )
        for split, folder in (("train", "train"), ("validation", "val"))
    }
    assert {split: len(content) for split, content in found.items()} == {"train": 47, "validation": 3 * HELD_OUT}
    return found


@pytest.fixture(scope="session")
def shards(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "out"
    assert main(["shards", str(photos), "--out", str(folder), "--images-per-shard", "6", "--workers", "2"]) == 0
    return folder


@pytest.fixture(scope="session")
def parquet(photos, tmp_path_factory):
    """The same images in the form that the Hub keeps them: parquet files of different lengths."""
    root = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for split, folder, parts in (("train", "train", 3), ("validation", "val", 2)):
        files = sorted((photos / folder).rglob("*.png"))
        for part in range(parts):
            chosen = files[part * 9 : part * 9 + 9 if part < parts - 1 else None]
            rows = {
                "image": [{"bytes": path.read_bytes(), "path": path.name} for path in chosen],
                "label": [list(CLASSES).index(path.parent.name) for path in chosen],
            }
            name = root / "data" / f"{split}-{part:05d}-of-{parts:05d}.parquet"
            name.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(rows, features=features).to_parquet(name)
    return root


@pytest.fixture(scope="session", params=["wds", "parquet"])
def opened(request, shards, parquet):
    """Open each kind of stream by its split."""
    name, root = ("wds/", str(shards)) if request.param == "wds" else (f"hfids/{parquet}", "")
    return partial(open_stream, name, root)


def read(stream, rank=0, world_size=1, workers=0, epoch=0, training=True):
    """Give the samples of one process."""
    stream.transform = stream.transform or flat
    stream.configure(training=training, seed=3, rank=rank, world_size=world_size)
    stream.set_epoch(epoch)
    return list(DataLoader(stream, batch_size=None, num_workers=workers))


def content(stream, samples):
    return Counter((tuple(image.tolist()), stream.class_names[label]) for image, label, _ in samples if label >= 0)


def order(samples):
    return [(tuple(image.tolist()), label, problem) for image, label, problem in samples]


@pytest.mark.parametrize(("world_size", "workers"), SHARES)
def test_training_takes_no_image_twice(opened, images, world_size, workers):
    stream = opened("train")
    assert stream.num_samples == 47
    assert sorted(stream.class_names) == sorted(CLASSES)
    parts = [read(stream, rank, world_size, workers) for rank in range(world_size)]
    each = 47 // (world_size * max(1, workers)) * max(1, workers)
    assert [len(part) for part in parts] == [each] * world_size
    seen = content(stream, list(chain(*parts)))
    assert seen <= images["train"]
    assert seen.total() == each * world_size
    assert {problem for part in parts for *_, problem in part} == {""}


@pytest.mark.parametrize(("world_size", "workers"), SHARES)
def test_evaluation_takes_each_image_once(opened, images, world_size, workers):
    stream = opened("validation")
    parts = [read(stream, rank, world_size, workers, training=False) for rank in range(world_size)]
    ranges = world_size * max(1, workers)
    assert [len(part) for part in parts] == [-(-21 // ranges) * max(1, workers)] * world_size
    assert content(stream, list(chain(*parts))) == images["validation"]
    padding = [image for part in parts for image, label, _ in part if label < 0]
    assert len(padding) == sum(map(len, parts)) - 21
    assert not torch.cat([torch.zeros(1), *padding]).any()


def test_the_order_depends_on_seed_and_epoch(opened):
    first, again, second, unshuffled = (
        order(read(opened("train"), epoch=epoch, training=training)) for epoch, training in ((0, 1), (0, 1), (1, 1), (0, 0))
    )
    assert first == again
    assert len({tuple(first), tuple(second), tuple(unshuffled)}) == 3
    assert sorted(first) == sorted(second) == sorted(unshuffled)


def test_what_is_left_out_changes(opened, images):
    stream = opened("train")
    left_out = [
        tuple(images["train"] - content(stream, chain(*(read(stream, rank, 3, 0, e) for rank in range(3))))) for e in range(6)
    ]
    assert all(len(pair) == 2 for pair in left_out)
    assert len(set(left_out)) > 1


def test_workers_that_persist_see_the_new_epoch(shards):
    stream = open_stream("wds/", str(shards), "train")
    stream.transform = flat
    stream.configure(training=True, seed=3)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 1, 4):
        stream.set_epoch(epoch)
        assert order(loader) == order(read(open_stream("wds/", str(shards), "train"), workers=2, epoch=epoch))


@pytest.mark.slow
def test_folders_and_single_files_work_as_hugging_face_sets(photos, images):
    stream = open_stream(f"hfids/{photos}", "", "train")
    assert (stream.num_samples, stream.class_names) == (47, sorted(CLASSES))
    parts = [[read(stream, rank, 2, 2, epoch) for rank in range(2)] for epoch in range(3)]
    seen = [content(stream, chain(*both)) for both in parts]
    assert all(counts <= images["train"] and counts.total() == 44 for counts in seen)
    assert len({tuple(sorted(counts)) for counts in seen}) > 1
    held_out = open_stream(f"hfids/{photos}", "", "validation")
    assert content(held_out, chain(*(read(held_out, rank, 2, training=False) for rank in range(2)))) == images["validation"]


def test_few_images_at_a_time_are_shuffled_too(shards, images, monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 4)
    stream = open_stream("wds/", str(shards), "train")
    for rank in range(2):
        seen = content(stream, read(stream, rank, 2))
        assert seen <= images["train"]
        assert seen.total() == 23


def augmented(stream, workers, skip=0, epoch=2):
    config = {"input_size": (3, 8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic"}
    stream.transform = classification_transform(Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5), config)
    stream.configure(training=True, seed=5, rank=1, world_size=2)
    stream.set_epoch(epoch)
    stream.skip(skip, 3)
    stream.set_epoch(epoch)  # Lightning does it again
    loader = DataLoader(stream, batch_size=3, num_workers=workers, drop_last=True)
    return [(images, labels) for images, labels, _ in loader]


@pytest.mark.filterwarnings("ignore:.*worker processes")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_run_that_is_resumed_sees_the_same(shards, workers):
    stream = open_stream("wds/", str(shards), "train")
    whole = augmented(stream, workers)
    assert len(whole) == stream.batches(3, workers)
    for done in (1, 4) if workers else (2, len(whole)):
        torch.manual_seed(done)
        rest = augmented(stream, workers, skip=done)
        assert len(rest) == len(whole) - done
        for (images, labels), (others, other_labels) in zip(rest, whole[done:], strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)
    assert not torch.equal(augmented(stream, workers, epoch=3)[0][0], whole[0][0])


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_counted_before_they_are_read(shards, training):
    stream = open_stream("wds/", str(shards), "train")
    stream.transform = flat
    stream.configure(training=training, rank=0, world_size=2)
    for batch_size, workers in ((1, 0), (4, 0), (4, 2), (30, 1)):
        loader = DataLoader(stream, batch_size, drop_last=training, num_workers=workers)
        assert len(list(loader)) == stream.batches(batch_size, workers)


def rewritten(shards, folder, change):
    """Copy shards; `change` maps the bytes of each member, by its name, to new ones, or to none to leave it out."""
    shutil.copytree(shards, folder)
    for path in folder.glob("*.tar"):
        with tarfile.open(shards / path.name) as old, tarfile.open(path, "w") as new:
            for member in old:
                value = change(member.name, old.extractfile(member).read())
                if value is not None:
                    member.size = len(value)
                    new.addfile(member, io.BytesIO(value))
    return folder


def bad_images(numbers):
    """Spoil the images of these numbers, each in another way."""
    how = (
        lambda suffix, value: value[: len(value) // 2] if suffix == "png" else value,
        lambda suffix, value: b"" if suffix == "png" else value,
        lambda suffix, value: None if suffix == "png" else value,
        lambda suffix, value: b"3" if suffix == "cls" else value,
        lambda suffix, value: b"-1" if suffix == "cls" else value,
        lambda suffix, value: b"two" if suffix == "cls" else value,
        lambda suffix, value: None if suffix == "cls" else value,
    )

    def change(name, value):
        key, _, suffix = name.partition(".")
        return how[numbers.index(int(key)) % len(how)](suffix, value) if int(key) in numbers else value

    return change


@pytest.mark.parametrize("numbers", [[0], [46], [1, 2, 3, 14, 22, 23, 40], list(range(10, 47))], ids=str)
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_unreadable_images_are_replaced_and_named(shards, images, tmp_path, numbers, world_size, workers, monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 2)  # some ranges begin, and some end, with bad ones
    folder = rewritten(shards, tmp_path / "bad", bad_images(numbers))
    stream = open_stream("wds/", str(folder), "train")
    parts = [read(stream, rank, world_size, workers) for rank in range(world_size)]
    assert {len(part) for part in parts} == {47 // (world_size * max(1, workers)) * max(1, workers)}
    samples = list(chain(*parts))
    problems = [problem for *_, problem in samples if problem]
    assert len(set(problems)) == len(problems) >= len(numbers) - 1  # one image is left out where 47 is divided by 2
    assert all(re.match(r"train-\d{6}\.tar: train/\d+/\d+\.png: ", problem) for problem in problems)
    assert set(content(stream, samples)) <= set(images["train"])
    assert content(stream, [sample for sample in samples if not sample[2]]) <= images["train"]


def test_unreadable_images_do_not_count_in_evaluation(shards, images, tmp_path):
    folder = rewritten(shards, tmp_path / "bad", bad_images([0, 1, 2, 10, 11, 12, 20]))
    stream = open_stream("wds/", str(folder), "validation")
    samples = list(chain(*(read(stream, rank, 2, training=False) for rank in range(2))))
    assert len(samples) == 22
    assert content(stream, samples) < images["validation"]
    left_out = [(image, problem) for image, label, problem in samples if label < 0]
    assert sum(bool(problem) for _, problem in left_out) == 7
    assert len(left_out) == 8  # one fills up
    assert not torch.stack([image for image, _ in left_out]).any()


def test_a_set_without_a_readable_image_is_refused(shards, tmp_path):
    folder = rewritten(shards, tmp_path / "bad", lambda name, value: b"" if name.endswith("png") else value)
    with pytest.raises(ValueError, match=r"^no image can be read: train-.*\.png"):
        read(open_stream("wds/", str(folder), "train"))


def edit_info(folder, **changes):
    info = json.loads((folder / "_info.json").read_text())
    for name, value in changes.items():
        (info["splits"]["train"] if name in info["splits"]["train"] else info)[name] = value
    (folder / "_info.json").write_text(json.dumps(info))


def truncate(folder):
    path = folder / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:3000])


def truncate_between_members(folder):
    path = folder / "train-000002.tar"
    with tarfile.open(path) as archive:
        end = [member for member in archive if member.name.endswith("json")][2].offset
    path.write_bytes(path.read_bytes()[:end])


LENGTHS = [6, 6, 6, 6, 6, 6, 6, 5]


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (truncate, r"train-000002\.tar: cannot be read after \d samples: unexpected end of data$"),
        (truncate_between_members, r"train-000002\.tar: holds fewer than 6 samples$"),
        (
            lambda folder: (folder / "train-000002.tar").write_bytes(b"no tar" * 1000),
            r"train-000002\.tar: cannot be read after 0",
        ),
        (lambda folder: (folder / "train-000002.tar").unlink(), r"train-000002\.tar: no such shard \(1 of 8 are missing\)$"),
        (
            lambda folder: edit_info(folder, shard_lengths=[7, 5, *LENGTHS[2:]]),
            r"\.tar: holds (fewer than 7|more than 5) samples$",
        ),
        (
            lambda folder: edit_info(folder, shard_lengths=LENGTHS[:7]),
            r"_info\.json: splits: train: filenames, shard_lengths and num_samples do not",
        ),
        (
            lambda folder: edit_info(folder, num_samples=48),
            r"_info\.json: splits: train: filenames, shard_lengths and num_samples do not",
        ),
        (lambda folder: edit_info(folder, shard_lengths=None), r": shard_lengths is null, expected a list of integers"),
        (lambda folder: edit_info(folder, filenames=[1] * 8), r": filenames is \[1, .*\], expected a list of texts"),
        (lambda folder: edit_info(folder, splits={}), r": has no split train, only "),
        (lambda folder: (folder / "_info.json").write_text('{"splits": {}}'), r"_info\.json: has no class_names"),
        (lambda folder: (folder / "_info.json").write_text("{"), r"_info\.json: cannot be read: "),
        (lambda folder: (folder / "_info.json").write_text("[1]"), r"_info\.json: is \[1\], expected an object"),
        (lambda folder: (folder / "_info.json").unlink(), r"^wds/: no _info\.json, which gmf shards writes, in /"),
    ],
)
def test_damaged_shards_are_named_in_one_line(shards, tmp_path, damage, hint):
    folder = shutil.copytree(shards, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=hint) as error:
        read(open_stream("wds/", str(folder), "train"))
    assert "\n" not in str(error.value)


def test_nothing_in_a_shard_is_unpickled(shards, images, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    folder = shutil.copytree(shards, tmp_path / "trapped")
    for path in folder.glob("*.tar"):
        with tarfile.open(shards / path.name) as old, tarfile.open(path, "w") as new:
            for member in old:
                new.addfile(member, old.extractfile(member))
                if member.name.endswith("cls"):
                    for suffix in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "cbor"):
                        trap = tarfile.TarInfo(member.name.replace("cls", suffix))
                        value = pickle.dumps(Trap())
                        trap.size = len(value)
                        new.addfile(trap, io.BytesIO(value))
    stream = open_stream("wds/", str(folder), "train")
    assert content(stream, read(stream)) == images["train"]
    assert not (tmp_path / "sprung").exists()


class Unreliable(SimpleHTTPRequestHandler):
    """Sends half of each file at its first request."""

    asked = None  # how often, by path

    def copyfile(self, source, outputfile):
        self.asked[self.path] += 1
        whole = source.read()
        outputfile.write(whole if self.asked[self.path] > 1 else whole[: len(whole) // 2])

    def log_message(self, *args):
        pass


@pytest.fixture
def url(shards, monkeypatch):
    monkeypatch.setattr(Unreliable, "asked", Counter())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Unreliable, directory=str(shards.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_by_url(url, shards, workers, monkeypatch):
    local = order(read(open_stream("wds/", str(shards), "train"), workers=workers))
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    assert order(read(open_stream(f"wds/{shards.name}", url, "train"), workers=workers)) == local
    assert order(read(open_stream(f"wds/{url}/{shards.name}", "data", "train"), workers=workers)) == local
    assert set(Unreliable.asked) == {f"/{shards.name}/{path.name}" for path in shards.glob("[_t]*")}


def test_a_url_that_cannot_be_read_is_named(url, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=f"^wds/gone: no _info.json, which gmf shards writes, in {url}/gone or gone or {url}$"):
        open_stream("wds/gone", url, "train")
    monkeypatch.setattr(sources, "MAX_ATTEMPTS", 1)
    with pytest.raises(ValueError, match=f"^{url}/out/_info.json: cannot be read: "):
        open_stream("wds/out", url, "train")
    for hostile in (
        f"pipe:touch {tmp_path}/sprung",
        f"pipe://touch {tmp_path}/sprung",
        f"http://127.0.0.1:1/;touch {tmp_path}/sprung",
    ):
        with pytest.raises(ValueError, match=r"_info\.json"):
            open_stream("wds/", hostile, "train")
    assert not (tmp_path / "sprung").exists()


def test_shards_lie_under_root_by_name(shards):
    for name, root in (
        ("wds/", shards),
        ("wds/imagenet", shards),
        (f"wds/{shards.name}", shards.parent),
        (f"wds/{shards}", "data"),
    ):
        assert open_stream(name, str(root), "validation").num_samples == 21


def test_timm_reads_the_shards(shards, photos):
    theirs = create_dataset("wds/photos", root=str(shards), split="validation", is_training=False)
    folder = create_dataset("", str(photos / "val"), search_split=False)
    theirs.transform = folder.transform = flat
    assert [(tuple(image.tolist()), label) for image, label in theirs] == [
        (tuple(image.tolist()), label) for image, label in (folder[index] for index in range(len(folder)))
    ]
    for_training = create_dataset("wds/photos", root=str(shards), split="train", is_training=True, batch_size=1)
    assert len(for_training) == 47


def test_files_are_kept_as_they_are(photos, shards):
    seen = {}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as archive:
            values = {member.name: archive.extractfile(member).read() for member in archive}
        for name in values:
            if name.endswith("json"):
                notes = json.loads(values[name])
                assert int(values[name.replace("json", "cls")]) == notes["label"]
                seen[notes["filename"]] = values[name.replace("json", "png")]
    assert seen == {str(path.relative_to(photos)): path.read_bytes() for path in photos.rglob("*.png")}


def test_shards_names_what_it_leaves_out(photos, tmp_path, capsys):
    copy = shutil.copytree(photos, tmp_path / "photos")
    (copy / "train" / "2" / "empty.jpeg").touch()
    Image.new("CMYK", (9, 9)).save(copy / "val" / "10" / "good.JPEG")
    argv = ["shards", str(copy), "--out", str(tmp_path / "out"), "--images-per-shard", "10", "--seed", "1"]
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["train"], result["validation"], result["shards"]) == (47, 22, 8)
    assert len(result["skipped"]) == 1
    assert f"{copy}/train/2/empty.jpeg: not a readable image" in captured.err
    assert len(read(open_stream("wds/", str(tmp_path / "out"), "train"))) == 47
    assert not list(tmp_path.glob("*.part"))
    assert main(argv) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*argv[:3], str(tmp_path / "new"), "--images-per-shard", "0"]) == 2
    assert main(["shards", "nowhere", "--out", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def test_shards_that_were_interrupted_are_begun_again(photos, shards, tmp_path):
    def stop(done, what, total):
        yield next(done)
        raise KeyboardInterrupt

    files = {
        split: create_dataset("", str(photos / folder), search_split=False).reader.samples
        for split, folder in (("train", "train"), ("validation", "val"))
    }
    settings = {"class_names": list(CLASSES), "out": tmp_path / "out", "seed": 0, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        write_shards(photos, files, per_shard=2, progress=stop, **settings)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    write_shards(photos, files, per_shard=6, progress=lambda done, *_: done, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in shards.iterdir()
    }


def test_a_hugging_face_set_must_have_classes(parquet, tmp_path):
    for name, hint in ((str(tmp_path), "cannot be opened"), ("nobody/nothing", "cannot be opened")):
        with pytest.raises(ValueError, match=f"^hfids/{name}: {hint}") as error:
            open_stream(f"hfids/{name}", "", "train")
        assert "\n" not in str(error.value)
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"expected a column of images and one of class labels, got text, label$"):
        open_stream(f"hfids/{tmp_path}", "", "train")
    with pytest.raises(ValueError, match=r"has no split validation, only train$"):
        open_stream(f"hfids/{tmp_path}", "", "validation")


def test_hugging_face_images_may_be_missing(parquet, tmp_path):
    copy = shutil.copytree(parquet, tmp_path / "copy")
    path = next(copy.rglob("train-00001*"))
    table = datasets.Dataset.from_parquet(str(path)).cast_column("image", datasets.Image(decode=False))
    rows = table.to_dict()
    rows["image"][0], rows["image"][1], rows["label"][2] = None, {"bytes": b"", "path": "x.png"}, -1
    datasets.Dataset.from_dict(rows, features=datasets.Dataset.from_parquet(str(path)).features).to_parquet(path)
    samples = read(open_stream(f"hfids/{copy}", "", "train"))
    assert len(samples) == 47
    assert sorted(problem for *_, problem in samples if problem)[0].startswith(f"{path.name}: ")
    assert len({problem for *_, problem in samples}) == 4


@pytest.mark.slow
def test_a_run_on_shards(photos, shards, parquet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # PyTorch waits as long for failed workers
    options = ["--model", "test_resnet", "--epochs", "1", "--image_size", "32", "--batch_size", "8", "--workers", "2"]
    assert main(["train", "folder", "--data", "wds/", "--root", str(shards), *options, "--out", str(tmp_path / "run")]) == 0
    found = []
    for data in ([], ["--data", str(photos)], ["--data", f"hfids/{parquet}", "--workers", "2"]):
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "run"), *data, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        found.append([result[key] for key in ("images", "top1", "top5", "loss")])
    assert found[0][0] == 21
    assert found[1:] == [pytest.approx(found[0])] * 2
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    (damaged / "validation-000001.tar").write_bytes(b"")
    assert main(["eval", str(tmp_path / "run"), "--data", "wds/", "--root", str(damaged), "--workers", "2"]) == 1
    line = f"gmf: error: {damaged}/validation-000001.tar: cannot be read after 0 samples: empty file\n"
    assert capsys.readouterr().err == line
    gc.collect()


def test_the_missing_library_is_named(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    assert main(["shards", str(photos), "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'groupmixformer[data]'" in capsys.readouterr().err
