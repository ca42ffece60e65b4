"""Data without parts, dealt out to training and validation: stratified, near duplicates together, stored in the run."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groupmixformer.cli.main import main
from groupmixformer.data.duplicates import fingerprint, groups, near_pairs
from groupmixformer.data.split import Split, Splitter, deal
from groupmixformer.run import Run
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks.detection.data import CocoImages
from groupmixformer.tasks.registry import build_task
from groupmixformer.tasks.segmentation.data import SemanticImages
from groupmixformer.training.recipe import read_recipe
from groupmixformer.training.trainer import train

TINY = ["--image-size", "32", "--crop-pct", "1.0", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--epochs", "1"]
TINY += ["--model", "test_resnet", "--optimizer.lr_batch", "null"]


def picture(seed, size=(60, 50)):
    """An image of its own: smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def write_flat(root, counts, start=0):
    """Write a folder of class folders, with so many different images of each class."""
    for label, (name, number) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + number):
            picture(1000 * label + i).save(root / name / f"{i}.png")
    return root


def copies(path):
    """Write near duplicates of an image beside it: larger, re-encoded, brighter; return their names."""
    image, made = Image.open(path).convert("RGB"), []
    for name, copy in {
        "large.png": image.resize((image.width * 2, image.height * 2)),
        "small.jpg": image.resize((image.width * 2 // 3, image.height * 2 // 3)),
        "worse.jpg": image,
        "bright.png": image.point(lambda value: min(255, round(value * 1.1))),
    }.items():
        made.append(path.with_name(f"{path.stem}-{name}"))
        copy.save(made[-1], **({"quality": 40} if name == "worse.jpg" else {}))
    return made


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return write_flat(tmp_path_factory.mktemp("flat"), {"cat": 10, "dog": 15})


def fit(data, out, *more, resume=False):
    options = ["--data", str(data), "--out", str(out), *TINY, *(str(word) for word in more)]
    return train(read_recipe("folder", options), build_task, resume)


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def parts(run):
    return json.loads((run / "split.json").read_text())["parts"]


def split(folder, share=0.2, seed=0, **more):
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.*"))}
    splitter = Splitter(share, seed=seed, **more)
    names = sorted({path.parent.name for path in files.values()})
    return splitter(files, lambda: [[names.index(path.parent.name)] for path in files.values()]), splitter


# Dealing


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 5),
)
def test_every_class_is_divided_to_within_an_image(labels, share, seed):
    part = deal([[label] for label in labels], np.arange(len(labels)), [1 - share, share], seed)
    for label in set(labels):
        held_out = sum(int(number) for number, own in zip(part, labels, strict=True) if own == label)
        assert abs(held_out - share * labels.count(label)) < 1


@settings(deadline=None)
@given(
    images=st.lists(st.tuples(st.sets(st.integers(0, 3)), st.integers(0, 20)), min_size=1, max_size=50),
    folds=st.integers(2, 6),
)
def test_a_group_is_never_divided_and_every_image_dealt_out_once(images, folds):
    group = np.array([number for _, number in images])
    part = deal([classes for classes, _ in images], group, [1 / folds] * folds, 0)
    assert part.shape == group.shape and part.min() >= 0 and part.max() < folds
    for number in set(group.tolist()):
        assert len(set(part[group == number].tolist())) == 1


def test_images_of_several_classes_are_divided_with_each_of_them():
    rng = np.random.default_rng(0)
    classes = [np.flatnonzero(rng.random(4) < (0.6, 0.4, 0.2, 0.06)).tolist() for _ in range(200)]
    part = deal(classes, np.arange(200), [0.75, 0.25], 0)
    assert abs(part.sum() - 50) <= 2
    for label in range(4):
        there = np.array([label in found for found in classes])
        assert abs(part[there].mean() - 0.25) < 0.06


def test_another_seed_deals_otherwise_and_the_same_one_alike(flat):
    first, again, other = split(flat)[0], split(flat)[0], split(flat, seed=1)[0]
    assert first == again
    assert first.parts != other.parts


# Near duplicates


def test_copies_are_found_and_different_images_are_not(tmp_path):
    folder = write_flat(tmp_path, {"one": 6, "two": 6})
    original = folder / "one" / "0.png"
    made = copies(original)
    shutil.copy(original, folder / "two" / "same.png")
    paths = sorted(folder.rglob("*.*"))
    group = groups(len(paths), near_pairs([fingerprint(path) for path in paths]))
    together = {paths[i] for i in np.flatnonzero(group == group[paths.index(original)])}
    assert together == {original, folder / "two" / "same.png", *made}
    assert len(set(group.tolist())) == 12


def test_images_of_one_colour_are_the_same_only_if_the_colour_is(tmp_path):
    colors = {
        "red": (200, 10, 10),
        "red too": (198, 12, 10),
        "blue": (10, 10, 200),
        "black": (0, 0, 0),
        "white": (255, 255, 255),
    }
    for name, color in colors.items():
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in colors]
    assert near_pairs([fingerprint(path) for path in paths]) == [(0, 1)]


def test_no_copy_crosses_the_split(tmp_path):
    folder = write_flat(tmp_path, {"one": 9, "two": 9})
    families = [[path, *copies(path)] for path in sorted(folder.rglob("[0-3].png"))]
    for seed in range(4):
        made, splitter = split(folder, 0.3, seed)
        held_out = made.names("val")
        assert held_out
        for family in families:
            assert len({path.relative_to(folder).as_posix() in held_out for path in family}) == 1
        assert "40 of them near duplicates, in 8 groups" in splitter.notes[0]


def test_images_that_are_all_one_cannot_be_divided(tmp_path):
    folder = write_flat(tmp_path, {"one": 1, "two": 0})
    copies(folder / "one" / "0.png")
    with pytest.raises(ValueError, match="cannot be dealt out: nothing is left for val"):
        split(folder)


def test_an_unreadable_file_is_dealt_out_like_any_other(tmp_path):
    folder = write_flat(tmp_path, {"one": 4, "two": 4})
    (folder / "one" / "bad.png").write_bytes(b"no image")
    made, _ = split(folder, 0.5)
    assert sorted([*made.parts["train"], *made.parts["val"]]) == sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*.png")
    )


# Runs


def test_a_folder_without_parts_names_the_option(flat, tmp_path, capsys):
    error = gmf(capsys, "train", "folder", "--data", flat, "--out", tmp_path / "run", *TINY, code=1).err
    assert error.count("\n") == 1 and "--val-share 0.2" in error


def test_a_run_trains_and_is_measured_on_its_own_parts(flat, tmp_path, capsys):
    out = tmp_path / "run"
    told = json.loads(gmf(capsys, "train", "folder", "--data", flat, "--out", out, "--val-share", "0.2", *TINY, "--json").out)
    made = parts(out)
    assert Counter(name.split("/")[0] for name in made["val"]) == {"cat": 2, "dog": 3}
    assert sorted([*made["train"], *made["val"]]) == sorted(p.relative_to(flat).as_posix() for p in flat.rglob("*.png"))
    assert told["images"] == 5 and not list(out.rglob("cat"))
    for data in ([], ["--data", flat]):  # whoever names the same folder must not measure on what was trained on
        measured = json.loads(gmf(capsys, "eval", out, *data, "--json").out)
        assert measured["images"] == 5 and measured["top1"] == told["top1"]
    module = build_task(read_recipe(str(out / "recipe.yaml")), 1)
    shown = {Path(path).relative_to(flat).as_posix() for path, _ in module.loaders.train.source.samples}
    assert shown == set(made["train"])


@pytest.mark.slow
def test_a_resumed_run_keeps_its_split_when_files_are_added_and_says_so(flat, tmp_path, capsys):
    data, out = shutil.copytree(flat, tmp_path / "data"), tmp_path / "run"
    fit(data, out, "--val-share", "0.2")
    before = (out / "split.json").read_bytes()
    write_flat(data, {"cat": 3, "dog": 0}, start=500)
    (data / parts(out)["train"][0]).unlink()
    again = ["train", out / "recipe.yaml", "--resume", "--epochs", "2", "--json"]
    result = gmf(capsys, *again)
    assert (out / "split.json").read_bytes() == before
    notes = json.loads(result.out)["notes"]
    assert any("3 images were added since" in note and "left out: cat/500.png" in note for note in notes)
    assert any("1 images of" in note and "not there any more" in note for note in notes)
    assert json.loads(gmf(capsys, "eval", out, "--json").out)["images"] == 5
    error = gmf(capsys, *again, "--val-share", "0.4", code=1).err.splitlines()[-1]
    assert "was made with val_share 0.2" in error


def test_a_resumed_run_ends_as_an_uninterrupted_one(flat, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    fit(flat, whole, "--val-share", "0.2", "--epochs", "2")
    fit(flat, parted, "--val-share", "0.2")
    fit(flat, parted, "--val-share", "0.2", "--epochs", "2", resume=True)
    weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, parted)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_new_run_is_split_anew_where_an_earlier_one_left_only_its_split(flat, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    Split(0, 0.2, None, None, {"train": ["gone.png"], "val": ["other.png"]}).write(out / "split.json")
    fit(flat, out, "--val-share", "0.2")
    assert len(parts(out)["train"]) == 20


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--val-share", "0.2", "--folds", "3"], "expected one of them"),
        (["--folds", "3", "--fold", "4"], "from 1 to that of the folds"),
        (["--val-share", "1.5"], "expected a number from 0.01 to 0.9"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(flat, tmp_path, capsys, options, expected):
    error = gmf(capsys, "train", "folder", "--data", flat, "--out", tmp_path / "run", *options, code=2).err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("data", ["digits", "photos"])
def test_data_with_parts_is_not_divided_again(data, photos, tmp_path, capsys):
    name = photos if data == "photos" else data
    error = gmf(capsys, "train", "folder", "--data", name, "--out", tmp_path / "run", "--val-share", "0.2", *TINY, code=1).err
    assert "leave out val_share" in error.splitlines()[-1]


def test_a_damaged_split_is_named(flat, tmp_path):
    (tmp_path / "split.json").write_text('{"seed": 0, "parts": {"train": [1], "val": []}}')
    with pytest.raises(ValueError, match=r"split\.json: parts: train is \[1\], expected a list of texts"):
        split(flat, stored=[tmp_path / "split.json"])


# Other tasks


def test_semantic_images_without_parts_are_dealt_out_by_the_classes_in_their_masks(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    (tmp_path / "classes.json").write_text(json.dumps({"classes": [{"id": i, "name": str(i)} for i in range(2)]}))
    for i in range(12):
        picture(i).save(tmp_path / "images" / f"{i}.png")
        Image.new("L", (60, 50), int(i % 4 == 0)).save(tmp_path / "masks" / f"{i}.png")
    with pytest.raises(ValueError, match="--val-share"):
        SemanticImages(tmp_path, "train")
    splitter = Splitter(0.34)
    train_set, held_out = (SemanticImages(tmp_path, part, splitter=splitter) for part in ("train", "val"))
    assert (len(train_set), len(held_out)) == (8, 4) and not set(train_set.names) & set(held_out.names)
    assert sum(int(Path(name).stem) % 4 == 0 for name in held_out.names) == 1
    with pytest.raises(ValueError, match="has no part test"):
        SemanticImages(tmp_path, "test", splitter=splitter)


def write_coco(root, number):
    (root / "images").mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 50} for i in range(number)]
    for i in range(number):
        picture(i).save(root / "images" / f"{i}.png")
    kinds = {"bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    objects = [{"id": i + 1, "image_id": i, "category_id": 1 + (i % 3 == 0), **kinds} for i in range(number)]
    (root / "annotations").mkdir()
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    (root / "annotations" / "instances_default.json").write_text(json.dumps(content))
    return root


def test_coco_annotations_in_one_file_are_dealt_out(tmp_path):
    root = write_coco(tmp_path / "coco", 12)
    with pytest.raises(ValueError, match="--val-share"):
        CocoImages(root, "train", masks=False)
    splitter = Splitter(0.5)
    train_set = CocoImages(root, "train", False, lambda *pair: pair, splitter=splitter)
    held_out = CocoImages(root, "val", False, splitter=splitter)
    assert train_set.count_classes()[0] == held_out.count_classes()[0] == [4, 2]
    ids = {image["id"] for image in held_out.ground_truth["images"]}
    assert len(ids) == 6 and {found["image_id"] for found in held_out.ground_truth["annotations"]} == ids
    shutil.copy(root / "annotations" / "instances_default.json", root / "annotations" / "instances_val.json")
    with pytest.raises(ValueError, match="leave out val_share"):
        CocoImages(root, "train", False, splitter=splitter)


@pytest.mark.slow
def test_a_detector_is_measured_on_the_part_that_was_held_out(tmp_path, capsys):
    root, out = write_coco(tmp_path / "coco", 10), tmp_path / "run"
    small = ["--image-size", "64", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--epochs", "1"]
    small += ["--model", "test_convnext", "--detector.max-size", "64", "--detector.fpn-channels", "32"]
    small += ["--detector.architecture", "retinanet"]
    told = json.loads(gmf(capsys, "train", "bccd", "--data", root, "--out", out, "--val-share", "0.3", *small, "--json").out)
    assert told["images"] == 3 == len(parts(out)["val"])
    assert json.loads(gmf(capsys, "eval", out, "--json").out)["box_AP"] == told["box_AP"]
    assert json.loads(gmf(capsys, "eval", out, "--split", "train", "--json").out)["images"] == 7


def test_the_own_data_of_a_run_on_data_with_parts_has_no_splitter(photos, tmp_path):
    run = Run.open(fit(photos, tmp_path / "run"))
    assert "splitter" not in run._data(None)[1] and not (run.path / "split.json").exists()


@pytest.mark.slow
def test_two_processes_share_a_split_and_balance_over_both(flat, tmp_path):
    """Each deals the images out on its own, and both must come to the same."""
    script = tmp_path / "start.py"
    script.write_text(
        "if __name__ == '__main__':\n    from groupmixformer.cli.main import main\n    raise SystemExit(main())\n"
    )
    runs = {}
    for devices in (1, 2):
        out = tmp_path / str(devices)
        options = ["--devices", devices, "--val-share", "0.2", "--balance", "sampling", "--batch-size", 4 // devices, "--json"]
        argv = [sys.executable, script, "train", "folder", "--data", flat, "--out", out, *TINY, *options]
        done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        runs[devices] = (parts(out), json.loads(done.stdout))
    assert runs[1][0] == runs[2][0] and runs[2][1]["images"] == 5
    losses = [read_metrics(tmp_path / str(devices))[0]["loss"] for devices in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=0.2)  # BatchNorm sees half the images


def test_shards_of_a_folder_without_parts(flat, photos, tmp_path, capsys):
    error = gmf(capsys, "shards", flat, "--out", tmp_path / "none", code=1).err
    assert "--val-share 0.2" in error
    told = json.loads(gmf(capsys, "shards", flat, "--out", tmp_path / "shards", "--val-share", "0.2", "--json").out)
    assert (told["train"], told["validation"]) == (20, 5)
    assert "leave out --val-share" in gmf(capsys, "shards", photos, "--out", tmp_path / "x", "--val-share", "0.2", code=1).err
