"""Data sets with a class for every pixel: read, checked and augmented; their numbers; what is drawn of them."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from groupmixformer.tasks.segmentation.data import (
    IGNORE,
    SemanticImages,
    collate_segmentation,
    segmentation_transform,
)
from groupmixformer.tasks.segmentation.metrics import confusion_matrix, segmentation_metrics
from groupmixformer.visual.drawing import SIDE, draw_objects, draw_segments, palette

NAMES = ["sky", "road", "car"]
IDS = np.array([3, 7, 10])  # in the mask files
COLORS = np.array([[220, 30, 30], [30, 200, 40], [30, 50, 220]])  # of the images, far from each other
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.2]


def blocks(rng, height, width, side):
    """Labels (height, width) in squares, of a class each."""
    coarse = rng.integers(0, 3, (-(-height // side), -(-width // side)))
    return coarse.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]


def write_classes(root, **more):
    root.mkdir(parents=True, exist_ok=True)
    classes = [{"id": int(i), "name": name} for i, name in zip(IDS, NAMES, strict=True)]
    (root / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": 255, **more}))


def write_pair(root, split, name, photo, mask):
    for kind, pixels in (("images", photo), ("masks", mask)):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels).astype(np.uint8))
        image.save(root / kind / split / f"{name}.png")


def write_scenes(root, noise=0, side=16, **splits):
    """Write images whose colour tells the class, of different sizes, with a corner that is to be ignored."""
    rng = np.random.default_rng(0)
    write_classes(root)
    for split, number in splits.items():
        for i in range(number):
            labels = blocks(rng, *rng.integers([40, 48], [72, 90]), side)
            mask = IDS[labels]
            mask[:8, :8] = 255
            image = COLORS[labels] + (rng.normal(0, noise, (*labels.shape, 3)) if noise else 0)
            write_pair(root, split, f"scene{i}", image.clip(0, 255), mask)
    return root


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=6, val=3)


@pytest.fixture
def copied(scenes, tmp_path):
    """A copy of `scenes`, to be spoilt."""
    return shutil.copytree(scenes, tmp_path / "data")


def stored(array):
    """The numbers of an image file."""
    return np.asarray(Image.open(array))


# Numbers


def test_the_numbers_are_those_worked_out_by_hand():
    # Class 2 is there and never found, 3 is neither there nor found, 4 is found and not there; the last pixel does not count.
    true = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 2, 2, IGNORE]])
    predicted = torch.tensor([[0, 0, 0, 1, 1], [1, 4, 0, 1, 2]])
    counts = confusion_matrix(true, predicted, 5)
    assert counts.tolist() == [[3, 1, 0, 0, 0], [0, 2, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    measured = segmentation_metrics(counts)
    assert measured["iou"] == [pytest.approx(3 / 5), pytest.approx(2 / 5), 0, None, 0]
    assert measured["mIoU"] == pytest.approx((3 / 5 + 2 / 5 + 0 + 0) / 4)
    assert measured["accuracy"] == pytest.approx(5 / 9)
    assert measured["mean_accuracy"] == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)


def test_the_miou_of_a_set_is_not_the_mean_of_its_images():
    images = [([0, 0, 0, 1], [0, 0, 0, 0]), ([1, 1, 1, 1], [1, 1, 1, 1])]
    counts = [confusion_matrix(torch.tensor([true]), torch.tensor([predicted]), 2) for true, predicted in images]
    assert [segmentation_metrics(each)["mIoU"] for each in counts] == [pytest.approx(3 / 8), 1.0]  # 11/16 on average
    assert segmentation_metrics(counts[0] + counts[1])["mIoU"] == pytest.approx((3 / 4 + 4 / 5) / 2)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
def test_the_confusion_matrix_counts_each_pixel_once(seed, classes):
    rng = np.random.default_rng(seed)
    true, predicted = rng.integers(0, classes, (2, 5, 7))
    true[rng.random((5, 7)) < 0.3] = IGNORE
    expected = np.zeros((classes, classes), dtype=int)
    for row, column in zip(true.flat, predicted.flat, strict=True):
        if row != IGNORE:
            expected[row, column] += 1
    assert confusion_matrix(torch.tensor(true), torch.tensor(predicted), classes).tolist() == expected.tolist()


def test_many_pixels_are_counted_exactly():
    counts = torch.tensor([[2**30 + 1, 1], [3, 2**31 + 1]])  # more than float32 can tell apart
    assert segmentation_metrics(counts)["accuracy"] == (3 * 2**30 + 2) / (3 * 2**30 + 6)


# Reading


def test_ids_with_gaps_become_labels(scenes):
    images = SemanticImages(scenes, "train")
    assert (images.class_names, images.class_ids) == (NAMES, IDS.tolist())
    assert images.skipped == []
    assert len(images) == 6
    for i in range(6):
        image, labels = images.read(i)
        mask = stored(images.masks[i])
        assert labels.shape == mask.shape == (image.height, image.width)
        assert {3, 7, 10, 255} >= set(np.unique(mask).tolist())
        for label, number in [(0, 3), (1, 7), (2, 10), (IGNORE, 255)]:
            assert ((labels.numpy() == label) == (mask == number)).all()
        counted = labels.numpy() != IGNORE
        assert (np.asarray(image)[counted] == COLORS[labels.numpy()[counted]]).all()


@pytest.mark.parametrize("ignore", [0, 200, None])
def test_the_number_to_ignore_is_that_of_the_classes_file(tmp_path, ignore):
    write_classes(tmp_path, ignore_index=ignore)
    masks = {"a": [[3, 7], [10, 3 if ignore is None else ignore]], "b": [[3, 255], [3, 3]]}
    for name, mask in masks.items():
        write_pair(tmp_path, "train", name, np.zeros((2, 2, 3)), mask)
    images = SemanticImages(tmp_path, "train")
    assert images.read(0)[1].tolist() == [[0, 1], [2, 0 if ignore is None else IGNORE]]
    with pytest.raises(ValueError, match=r"b\.png: holds the number 255, which is of no class"):
        images.read(1)


def test_colours_are_given_or_chosen(tmp_path):
    write_pair(tmp_path, "train", "a", np.zeros((2, 2, 3)), np.full((2, 2), 3))
    classes = [{"id": 3, "name": "sky", "color": [1, 2, 3]}, {"id": 7, "name": "road"}, {"id": 10, "name": "car"}]
    write_classes(tmp_path, classes=classes)
    given_color, *chosen = SemanticImages(tmp_path, "train").colors
    assert given_color == [1, 2, 3]
    assert chosen == palette(3)[1:]


def test_the_palette_has_a_colour_for_each_class():
    assert palette(2) == [[0, 114, 178], [213, 94, 0]]  # Okabe and Ito's blue and vermilion
    assert len({tuple(color) for color in [[0, 0, 0], *palette(255)]}) == 256


@pytest.mark.parametrize("listed", [True, False])
def test_ade20k_is_read_as_it_comes(tmp_path, listed):
    for split, value in (("training", 150), ("validation", 1)):
        image, mask = np.full((3, 4, 3), value), np.full((3, 4), value)
        mask[0, 0] = 0
        for kind, pixels, ending in (("images", image, "jpg"), ("annotations", mask, "png")):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / kind / split / f"ADE_1.{ending}")
    names = ["wall", "building, edifice", *(f"thing{i}" for i in range(3, 151))]
    if listed:
        rows = [f"{i}\t0.1\t20\t30\t1\t{name}" for i, name in enumerate(names, 1)]
        (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(rows) + "\n")
    train, val = (SemanticImages(tmp_path, split) for split in ("train", "val"))
    assert train.class_ids == list(range(1, 151))
    assert train.class_names == (["wall", "building", *names[2:]] if listed else [str(i) for i in range(1, 151)])
    assert (train.names, val.names) == tuple(
        [str(tmp_path / "images" / split / "ADE_1.jpg")] for split in ("training", "validation")
    )
    assert train.read(0)[1].tolist() == [[IGNORE, 149, 149, 149], [149] * 4, [149] * 4]
    assert val.read(0)[1].tolist() == [[IGNORE, 0, 0, 0], [0] * 4, [0] * 4]
    assert SemanticImages(tmp_path, "validation").names == val.names


def test_masks_with_a_palette_hold_numbers_and_not_colours(tmp_path):
    write_classes(tmp_path)
    mask = Image.fromarray(np.array([[3, 7], [10, 255]], dtype=np.uint8), mode="P")
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    write_pair(tmp_path, "train", "a", np.zeros((2, 2, 3)), mask)
    assert stored(tmp_path / "masks" / "train" / "a.png").tolist() == [[3, 7], [10, 255]]
    assert SemanticImages(tmp_path, "train").read(0)[1].tolist() == [[0, 1], [2, IGNORE]]


def test_masks_of_bits_hold_0_and_1(tmp_path):
    write_classes(tmp_path, classes=[{"id": 0, "name": "ground"}, {"id": 1, "name": "thing"}])
    write_pair(tmp_path, "train", "a", np.zeros((1, 3, 3)), Image.fromarray(np.array([[True, False, True]])))
    assert SemanticImages(tmp_path, "train").read(0)[1].tolist() == [[1, 0, 1]]


def test_camvid_opens_without_problems(shared):
    folder = shared("data/camvid")
    train, val = (SemanticImages(folder, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    assert train.skipped == val.skipped == []
    assert train.class_names[:3] == ["sky", "building", "pole"]
    assert train.class_names == val.class_names
    image, labels = train.read(0)
    assert (image.size, labels.shape) == ((480, 360), (360, 480))
    assert set(labels.unique().tolist()) <= {*range(11), IGNORE}


@pytest.mark.parametrize("side", ["image", "mask", "both"])
def test_masks_lie_on_what_people_see(copied, side):
    plain = SemanticImages(copied, "train")
    index = [name.endswith("scene1.png") for name in plain.names].index(True)
    for kind, path in (("image", plain.names[index]), ("mask", plain.masks[index])):
        if side in (kind, "both"):
            with Image.open(path) as upright:
                lying = upright.transpose(Image.Transpose.ROTATE_90)
            exif = lying.getexif()
            exif[0x112] = 6
            lying.save(path, exif=exif)
    turned = SemanticImages(copied, "train")
    assert turned.skipped == []
    image, labels = turned.read(index)
    assert image.tobytes() == plain.read(index)[0].tobytes() or side == "mask"
    assert np.array_equal(labels, SemanticImages(copied, "train").read(index)[1])
    counted = labels.numpy() != IGNORE
    assert (np.asarray(image)[counted] == COLORS[labels.numpy()[counted]]).all()


def test_a_mask_of_an_image_as_it_is_stored_is_refused(copied):
    path, mask = (copied / kind / "train" / "scene1.png" for kind in ("images", "masks"))
    for file, orientation in ((path, 6), (mask, 1)):
        with Image.open(file) as upright:
            lying = upright.transpose(Image.Transpose.ROTATE_90)
        exif = lying.getexif()
        exif[0x112] = orientation
        lying.save(file, exif=exif)
    (line,) = SemanticImages(copied, "train").skipped
    assert line.startswith(
        f"{path}: is, turned upright by its EXIF orientation, {lying.height} x {lying.width} pixels and its mask"
    )
    assert line.endswith("annotate it as it is seen, or remove the orientation from the file")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_hold_the_numbers_that_were_written(tmp_path, bits):
    most = 2**bits - 1
    write_classes(tmp_path, classes=[{"id": i, "name": f"{i}"} for i in range(most + 1)])
    write_pair(tmp_path, "train", "a", np.zeros((2, 8, 3)), np.zeros((2, 8)))
    numbers = np.arange(16).reshape(2, 8) % (most + 1)
    packed = np.packbits(np.unpackbits(numbers.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(2, -1), axis=1)
    content = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(content)), (b"IEND", b""))
    png = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "masks" / "train" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    assert SemanticImages(tmp_path, "train").read(0)[1].tolist() == numbers.tolist()


# Problems


def spoil(root, kind):
    """Spoil the pair `scene1` for training; return what is said of it."""
    image, mask = (root / folder / "train" / "scene1.png" for folder in ("images", "masks"))
    width, height = Image.open(image).size
    if kind == "no mask":
        mask.unlink()
        return f"{image}: has no mask {mask}"
    if kind == "another size":
        Image.open(mask).resize((width, height + 1), Image.Resampling.NEAREST).save(mask)
        return f"{image}: is {width} x {height} pixels and its mask scene1.png {width} x {height + 1}"
    if kind == "bad image":
        image.write_bytes(b"<html>not found</html>")
        return f"{image}: not a readable image: no known format"
    if kind == "bad mask":
        mask.write_bytes(b"")
        return f"{mask}: not a readable image: no known format"
    mode = {"coloured mask": "RGB", "deep mask": "I;16"}[kind]
    pixels = stored(mask)
    Image.fromarray(pixels.astype(np.uint16) if mode == "I;16" else np.stack([pixels] * 3, axis=2)).save(mask)
    return f"{mask}: is of mode {mode}, expected one channel of class numbers"


@pytest.mark.parametrize("kind", ["no mask", "another size", "bad image", "bad mask", "coloured mask", "deep mask"])
def test_a_pair_that_cannot_be_used_is_named_and_left_out(copied, kind):
    expected = spoil(copied, kind)
    images = SemanticImages(copied, "train")
    assert images.skipped == [expected]
    assert len(images) == len(images.masks) == 5
    assert not [name for name in (*images.names, *images.masks) if "scene1" in name]
    for i in range(5):
        images.read(i)


def test_what_systems_leave_is_no_image(copied):
    folder, plain = copied / "images" / "train", SemanticImages(copied, "train")
    assert plain.notes == []
    for name in ("._scene1.png", "Thumbs.db", "labels.txt"):
        (folder / name).write_bytes(b"left")
    found = SemanticImages(copied, "train")
    assert (found.names, found.skipped) == (plain.names, [])
    assert found.notes == ["files left out: 2 hidden or of the system, 1 .txt"]


def test_without_a_usable_pair_there_is_no_data_set(tmp_path):
    write_classes(tmp_path)
    write_pair(tmp_path, "train", "a", np.zeros((2, 2, 3)), np.zeros((3, 3)))
    with pytest.raises(
        ValueError, match=r"train: none of its 1 images can be used: .*a\.png: is 2 x 2 pixels and its mask a\.png 3 x 3"
    ):
        SemanticImages(tmp_path, "train")


def tail_off(path):
    """Cut a file in the middle: its head is still that of an image."""
    path.write_bytes(path.read_bytes()[:-30])


def renumber(path):
    pixels = stored(path).copy()
    pixels[-1, -1] = 9
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("images", tail_off, "not a readable image"),
        ("masks", tail_off, "not a readable mask"),
        ("masks", renumber, "holds the number 9, which is of no class"),
    ],
    ids=["image cut off", "mask cut off", "no class"],
)
def test_what_only_reading_finds_is_named_and_replaced(copied, kind, change, words):
    path = copied / kind / "train" / "scene1.png"
    change(path)
    images = SemanticImages(copied, "train", transform=lambda *pair: pair, prepare=lambda image: torch.ones(3, 32, 32))
    assert len(images) == 6
    index = [name.endswith("scene1.png") for name in images.names].index(True)
    with pytest.raises(ValueError, match=words) as raised:
        images.read(index)
    assert str(raised.value).startswith(f"{path}: ")
    image, labels, problem = images[0, index]
    following = images.read(index + 1)
    assert np.array_equal(np.asarray(image), np.asarray(following[0]))
    assert torch.equal(labels, following[1])
    assert problem == str(raised.value)
    image, labels, problem = images[index]
    assert (labels.shape, problem) == ((0, 0), str(raised.value))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("classes.json", r"expected one for segmentation \(.*images and masks, .*\); found images, masks"),
        ("images/train", "expected a part train; found val in .*images/val"),
        ("masks/train", "masks/train: no such folder, expected images in"),
    ],
)
def test_a_folder_that_is_missing_is_named(copied, missing, words):
    path = copied / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ValueError, match=words):
        SemanticImages(copied, "train")
    if missing != "classes.json":
        assert len(SemanticImages(copied, "val")) == 3


def test_an_empty_folder_is_named(copied):
    for path in (copied / "images" / "train").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"images/train: holds no images"):
        SemanticImages(copied, "train")


SKY = {"id": 3, "name": "sky"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "expected an object with fields"),
        ('{"names": ["sky"]}', "has no classes, expected a list of objects"),
        ({"classes": [{"id": 3}]}, r"classes\[0\]: has no name, expected a text"),
        ({"classes": [{**SKY, "name": None}]}, r"classes\[0\]: name is null, expected a text"),
        ({"classes": ["sky"]}, r"classes\[0\]: is \"sky\", expected an object"),
        ({"classes": []}, "classes has 0 entries, expected 1 to 255"),
        (
            {"classes": [SKY, {"id": 3, "name": "road"}]},
            r"classes\[1\]: id is 3, as in classes\[0\], expected an id of its own",
        ),
        ({"classes": [{"id": 256, "name": "sky"}]}, "from 0 to 255"),
        ({"classes": [{"id": -1, "name": "sky"}]}, "from 0 to 255"),
        ({"classes": [{"id": "3", "name": "sky"}]}, "from 0 to 255"),
        ({"classes": [SKY, {"id": 7, "name": "road"}], "ignore_index": 7}, "ignore_index is 7, the id of road"),
        ({"classes": [SKY], "ignore_index": 300}, "ignore"),
        ({"classes": [SKY], "ignore_index": "255"}, "ignore"),
        ({"classes": [{**SKY, "color": "red"}]}, "color"),
        ({"classes": [{**SKY, "color": [255, 0]}]}, "color"),
        ({"classes": [{"id": i, "name": str(i)} for i in range(256)]}, "classes"),  # whose last would be taken for IGNORE
    ],
    ids=lambda value: str(value)[:70],
)
def test_a_bad_list_of_classes_is_refused(copied, content, words):
    (copied / "classes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=words) as raised:
        SemanticImages(copied, "train")
    assert str(raised.value).startswith(f"{copied / 'classes.json'}: ")


# Samples


def transform(size=48, scale=(0.5, 2.0), hflip=0.5, photometric=False):
    return segmentation_transform(size, scale, hflip, photometric, MEAN, STD)


def far_from_borders(labels, reach=2):
    """Where all pixels within reach have the same label, which is not to be ignored."""
    same = labels != IGNORE
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            same &= torch.roll(labels, (down, right), (0, 1)) == labels
    inside = torch.zeros_like(same)
    inside[reach:-reach, reach:-reach] = same[reach:-reach, reach:-reach]
    return inside


def test_an_image_and_its_labels_stay_together(scenes):
    images = SemanticImages(scenes, "train", transform())
    colors = (torch.tensor(COLORS) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    shares, padded = [], 0
    for epoch in range(20):
        for i in range(len(images)):
            image, labels, _ = images[epoch, i]
            assert (image.shape, labels.shape) == ((3, 48, 48), (48, 48))
            assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
            distance = (image.permute(1, 2, 0)[:, :, None] - colors).abs().sum(3)  # (H, W, classes)
            inside = far_from_borders(labels)
            assert (distance.argmin(2) == labels)[inside].all()
            assert distance.min(2).values[inside].max() < 0.02
            shares.append(inside.float().mean().item())
            padded += (labels == IGNORE).float().mean().item() > 0.2
    assert np.mean(shares) > 0.4
    assert padded > 5  # so that images with padding are among them


@pytest.mark.parametrize("width", [60, 31])
def test_padding_is_grey_and_ignored(tmp_path, width):
    write_classes(tmp_path)
    write_pair(tmp_path, "train", "white", np.full((20, width, 3), 255), np.full((20, width), 7))
    images = SemanticImages(tmp_path, "train", transform(scale=(0.5, 0.5)))
    for epoch in range(10):
        image, labels, _ = images[epoch, 0]
        grey = (image.abs() < 0.02).all(dim=0)
        assert torch.equal(grey, labels == IGNORE)
        assert torch.equal(~grey, labels == 1)
        assert (~grey).sum() == 24 * min(48, 24 * width // 20)  # the shorter side is half of 48


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (47, 49), (48, 48), (200, 100)])
@pytest.mark.parametrize("scale", [(0.5, 2.0), (1.0, 1.0)])
def test_every_sample_is_a_square_of_the_size_asked_for(tmp_path, size, scale):
    write_classes(tmp_path)
    write_pair(tmp_path, "train", "a", np.zeros((*size, 3)), np.full(size, 7))
    images = SemanticImages(tmp_path, "train", transform(scale=scale, photometric=True))
    for epoch in range(5):
        image, labels, _ = images[epoch, 0]
        assert (image.shape, labels.shape) == ((3, 48, 48), (48, 48))
        assert image.isfinite().all()
        assert (labels == 1).any()


def test_a_flip_mirrors_both(scenes):
    plain, mirrored = (SemanticImages(scenes, "train", transform(scale=(2.0, 2.0), hflip=hflip)) for hflip in (0, 1))
    for i in range(len(plain)):
        first, second = plain[0, i], mirrored[0, i]
        assert torch.equal(first[0].flip(2), second[0])
        assert torch.equal(first[1].flip(1), second[1])
        assert not torch.equal(first[1], second[1])


def test_colours_change_and_labels_do_not(scenes):
    plain, changed = (SemanticImages(scenes, "train", transform(photometric=word)) for word in (False, True))
    pairs = [(plain[epoch, 0], changed[epoch, 0]) for epoch in range(5)]
    assert all(torch.equal(first[1], second[1]) for first, second in pairs)
    assert not all(torch.allclose(first[0], second[0], atol=0.1) for first, second in pairs)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_red_stays_red(tmp_path, channel):
    """Brightness, contrast, saturation and hue change a little: the channels are not exchanged."""
    write_classes(tmp_path)
    color = [220 if i == channel else 40 for i in range(3)]
    write_pair(tmp_path, "train", "a", np.full((48, 48, 3), color), np.full((48, 48), 3))
    images = SemanticImages(tmp_path, "train", transform(scale=(1.0, 1.0), photometric=True))
    for epoch in range(40):
        pixels = images[epoch, 0][0].mean(dim=(1, 2)) * torch.tensor(STD) + torch.tensor(MEAN)
        assert pixels.argmax() == channel


def test_a_sample_is_the_same_wherever_it_is_made(scenes):
    images = SemanticImages(scenes, "train", transform(photometric=True))
    images.seed = 3
    keys = [(epoch, i) for epoch in (0, 1) for i in range(len(images))]
    made = {key: images[key] for key in keys}
    assert len({image.numpy().tobytes() for image, _, _ in made.values()}) == len(keys)  # no two are alike
    backwards = keys[::-1]
    for workers in (0, 2):
        loader = DataLoader(images, 4, sampler=backwards, num_workers=workers, collate_fn=collate_segmentation)
        for i, batch in enumerate(loader):
            for part in (0, 1):
                assert torch.equal(batch[part], torch.stack([made[key][part] for key in backwards[4 * i : 4 * i + 4]]))
    images.seed = 4
    assert not torch.equal(images[0, 0][0], made[0, 0][0])


def test_evaluation_keeps_the_labels_in_the_size_of_the_file(scenes):
    images = SemanticImages(scenes, "val", prepare=lambda image: torch.zeros(3, 32, 50))
    for i in range(3):
        image, labels, problem = images[i]
        assert (image.shape, labels.dtype, problem) == ((3, 32, 50), torch.int64, "")
        assert torch.equal(labels, images.read(i)[1].long())
    image, labels, problem = images[-1]  # fills up a batch
    assert (labels.numel(), problem) == (0, "")
    photos, labels, problems = collate_segmentation([images[0], images[-1], images[1]])
    assert [mask.shape for mask in labels] == [images.read(0)[1].shape, (0, 0), images.read(1)[1].shape]
    assert (len(photos), problems) == (3, [])


def test_a_batch_names_each_problem():
    samples = [(torch.zeros(3, 4, 4), torch.zeros(4, 4), problem) for problem in ("", "a: bad\nb: bad", "c: bad")]
    images, labels, problems = collate_segmentation(samples)
    assert (images.shape, labels.shape, problems) == ((3, 3, 4, 4), (3, 4, 4), ["a: bad", "b: bad", "c: bad"])


# Drawing

HUES = [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]]


def grey_image(width=30, height=20):
    return Image.new("RGB", (width, height), (100, 100, 100))


def test_segments_are_laid_over_the_image_with_a_legend_from_the_largest():
    labels = torch.full((20, 30), IGNORE)
    labels[:4, :10], labels[8:18, :], labels[18:, 20:] = 0, 1, 3  # 40, 300 and 20 pixels; class 2 is not there
    image = grey_image()
    drawn = draw_segments(image, labels, ["a", "b", "c", "d"], HUES)
    assert image.tobytes() == grey_image().tobytes()
    factor = SIDE // 20
    height, width = SIDE, 30 * factor
    assert drawn.height == height and drawn.width > width
    pixels = np.asarray(drawn).astype(int)
    for row, column, label in [(2, 5, 0), (12, 25, 1), (19, 25, 3), (6, 15, IGNORE), (2, 20, IGNORE)]:
        expected = [100] * 3 if label == IGNORE else 0.4 * np.array([100] * 3) + 0.6 * np.array(HUES[label])
        assert np.abs(pixels[row * factor + factor // 2, column * factor + factor // 2] - expected).max() <= 1
    legend = pixels[:, width:]
    rows = {label: np.flatnonzero((legend == color).all(axis=2).any(axis=1)) for label, color in enumerate(HUES)}
    assert [label for label in rows if not len(rows[label])] == [2]
    assert rows[1].max() < rows[0].min() and rows[0].max() < rows[3].min()


def test_an_image_without_segments_stays_as_it_is():
    drawn = draw_segments(grey_image(600, 500), torch.full((500, 600), IGNORE), ["a"], HUES)
    assert (np.asarray(drawn.crop((0, 0, 600, 500))) == 100).all()
    assert (np.asarray(drawn.crop((600, 0, *drawn.size))) == 255).all()


def test_objects_are_drawn_where_they_are():
    image = grey_image(1000, 480)
    masks = torch.zeros(2, 480, 1000, dtype=torch.bool)
    masks[0, 100:200, 100:200] = masks[1, 300:400, 600:900] = True
    boxes = torch.tensor([[100.0, 100, 200, 200], [600, 300, 900, 400]])
    objects = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.6]), "masks": masks}
    drawn = np.asarray(draw_objects(image, objects, ["a", "b"])).astype(int)
    assert drawn.shape == (480, 1000, 3)
    assert image.tobytes() == grey_image(1000, 480).tobytes()
    first, second = (np.array(color) for color in palette(2))
    assert (drawn[100, 150] == first).all() and (drawn[300, 850] == second).all()  # the borders
    for color, (row, column) in ((first, (180, 180)), (second, (380, 800))):
        assert np.abs(drawn[row, column] - (0.6 * 100 + 0.4 * color)).max() <= 1
    assert (drawn[220:270] == 100).all() and (drawn[:, 910:] == 100).all()
    del objects["masks"], objects["scores"]
    boxed = np.asarray(draw_objects(image, objects, ["a", "b"]))
    assert (boxed[100, 150] == first).all() and (boxed[180, 180] == 100).all()


def test_small_images_are_enlarged_with_their_boxes():
    objects = {"boxes": torch.tensor([[10.0, 5, 20, 15]]), "labels": torch.tensor([1])}
    drawn = np.asarray(draw_objects(grey_image(), objects, ["a"]))
    factor = SIDE // 20
    assert drawn.shape == (SIDE, 30 * factor, 3)
    found = (drawn == palette(1)[0]).all(axis=2)
    assert found[15 * factor, 10 * factor : 20 * factor].all() and found[5 * factor : 15 * factor, 20 * factor].all()
    assert not found[: 2 * factor].any() and not found[:, 22 * factor :].any()


@pytest.mark.parametrize("masks", [True, False])
def test_an_image_without_objects_stays_as_it_is(masks):
    objects = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    if masks:
        objects["masks"] = torch.zeros(0, 20, 30, dtype=torch.bool)
    drawn = draw_objects(grey_image(), objects, ["a"])
    assert drawn.size == (SIDE * 30 // 20, SIDE)
    assert (np.asarray(drawn) == 100).all()


def test_where_masks_overlap_the_best_is_drawn():
    masks = torch.zeros(2, 480, 480, dtype=torch.bool)
    masks[0, :300], masks[1, 200:] = True, True
    boxes = torch.tensor([[0.0, 0.0, 479.0, 299.0], [0.0, 200.0, 479.0, 479.0]])
    objects = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64), "masks": masks}
    drawn = np.asarray(draw_objects(Image.new("RGB", (480, 480), "white"), objects, ["disc"])).astype(int)
    assert np.array_equal(drawn[250, 240], drawn[150, 240])
    assert not np.array_equal(drawn[250, 240], drawn[400, 240])
