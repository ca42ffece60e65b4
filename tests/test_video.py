"""Frames of videos, what is written of them, and large images in windows."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_predictions import gmf, runs  # noqa: F401 - a fixture

from groupmixformer.data.video import Video, is_stream, is_video, write_video
from groupmixformer.tasks.detection.predict import DetectionPredictor


def clip(path, number=10, rate=5, size=(64, 48), turn=0):
    """Write frames whose brightness is ten times their number, with a red corner."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        if turn:
            stream.set_display_rotation(turn)
        for i in range(number):
            pixels = np.full((size[1], size[0], 3), 10 * i, dtype=np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = (250, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(image):
    return int(np.asarray(image)[-8:, -8:].mean().round(-1))


def test_frames_are_given_with_number_and_time(tmp_path):
    video = Video(str(clip(tmp_path / "a.mp4")), every=3)
    frames = list(video)
    assert [(number, seconds) for number, seconds, _ in frames] == [(0, 0), (3, 0.6), (6, 1.2), (9, 1.8)]
    assert [brightness(image) for *_, image in frames] == [0, 30, 60, 90]
    assert video.rate == Fraction(5, 3)
    assert [number for number, *_ in Video(str(tmp_path / "a.mp4"), most=2)] == [0, 1]


@pytest.mark.parametrize(("turn", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_a_video_that_lies_on_its_side_is_turned_upright(tmp_path, turn, corner):
    image = next(iter(Video(str(clip(tmp_path / "a.mov", turn=turn)))))[2]
    assert image.size == ((64, 48) if turn == 180 else (48, 64))
    red, _, blue = np.asarray(image)[corner].tolist()
    assert red > 200 and blue < 60


def test_a_video_is_written_whole_or_not_at_all(tmp_path):
    images = [Image.new("RGB", (65, 49), (20 * i,) * 3) for i in range(5)]
    assert write_video(tmp_path / "a.mp4", iter(images), Fraction(30000, 1001))
    again = [image for *_, image in Video(str(tmp_path / "a.mp4"))]
    assert [brightness(image) for image in again] == [0, 20, 40, 60, 80] and again[0].size == (64, 48)
    assert not write_video(tmp_path / "b.mp4", iter([]), Fraction(5))

    def broken():
        yield from images
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "c.mp4", broken(), Fraction(5))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_what_is_no_video_is_said_in_a_line(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(ValueError, match=r"a\.mp4: not a readable video: Invalid data") as raised:
        Video(str(tmp_path / "a.mp4"))
    assert "\n" not in str(raised.value)
    for name, words in (("b.mp4", r"b\.mp4: no such file"), ("webcam:77", "webcam:77: not a readable video: No such file")):
        with pytest.raises(ValueError, match=words):
            Video(name)
    assert all(map(is_stream, ["webcam", "webcam:1", "rtsp://host/a", "http://host/a.mp4"]))
    assert not any(map(is_stream, ["webcam.jpg", "a/b.mp4"])) and is_video("A.MP4") and not is_video("a.jpg")


def test_frames_of_a_video_are_predicted(runs, tmp_path, capsys):  # noqa: F811
    video, image = clip(tmp_path / "a.mp4"), tmp_path / "1.png"
    next(iter(Video(str(video))))[2].save(image)
    words = ["--device", "cpu", "--json", "--format", "csv", "--out", tmp_path / "out"]
    said = json.loads(gmf(capsys, "predict", runs / "classifier", video, image, "--every", "4", *words).out)
    *frames, still = said["images"]
    assert [(row["image"], row["frame"], row["seconds"]) for row in frames] == [(str(video), n, n / 5) for n in (0, 4, 8)]
    assert still["classes"] == frames[0]["classes"] != frames[2]["classes"]
    rows = (tmp_path / "out" / "predictions.csv").read_text().split("\n")
    assert rows[1].startswith(f"{tmp_path / 'a-000000.png'},") and len(rows) == 1 + 4 * 3 + 1
    (tmp_path / "b.mp4").write_bytes(video.read_bytes()[: len(video.read_bytes()) // 2])
    said = gmf(capsys, "predict", runs / "classifier", tmp_path / "b.mp4", image, "--device", "cpu", "--json")
    assert json.loads(said.out)["skipped"] == [str(tmp_path / "b.mp4")] and "b.mp4: not a readable video" in said.err


@pytest.mark.slow
def test_objects_in_a_video_are_drawn_in_a_video(runs, tmp_path, capsys):  # noqa: F811
    video = clip(tmp_path / "a.mp4", size=(96, 64))
    words = ["--score-threshold", "0.01", "--device", "cpu", "--json", "--out", tmp_path, "--frames", "2", "--every", "5"]
    said = json.loads(gmf(capsys, "predict", runs / "detector", video, *words).out)
    assert [row["frame"] for row in said["images"]] == [0, 5] and said["images"][0]["objects"]
    drawn = tmp_path / "a-2.mp4"  # beside the one that was looked at
    assert {file for row in said["images"] for file in row["files"]} == {str(drawn)}
    assert [image.size for *_, image in Video(str(drawn))] == [(720, 480)] * 2
    assert len(list(Video(str(video)))) == 10
    assert json.loads((tmp_path / "results.json").read_text())[0]["image_id"] == "a-000000.png"


# Windows


class Spots:
    """Finds white rectangles: what a detector would, if it saw only those of up to 30 pixels, or of half of what it sees."""

    masks = True
    seen: list[tuple[int, int]]

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        (image,) = images
        self.seen.append(tuple(image.shape[1:]))
        height, width = image.shape[1:]
        found, pixels = [], image[0].clone()
        while pixels.any():
            row, column = (pixels > 0).nonzero()[0].tolist()
            w = int((pixels[row, column:] > 0).int().cumprod(0).sum())
            h = int((pixels[row:, column] > 0).int().cumprod(0).sum())
            pixels[row : row + h, column : column + w] = 0
            if max(h, w) * 4 > max(height, width):
                found.append([column, row, column + w, row + h])
        boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
        masks = torch.zeros(len(found), 1, height, width)
        for mask, (left, top, right, bottom) in zip(masks, found, strict=True):
            mask[0, top:bottom, left:right] = 1
        return [
            {
                "boxes": boxes,
                "labels": torch.ones(len(found), dtype=torch.int64),
                "scores": torch.full((len(found),), 0.9),
                "masks": masks,
            }
        ]


@pytest.fixture
def spots():
    predictor = object.__new__(DetectionPredictor)
    predictor.device, predictor.dtype, predictor.options, predictor.model = torch.device("cpu"), None, {"tile": None}, Spots()
    return predictor


def test_windows_find_small_objects_once_and_large_ones_whole(spots):
    image = torch.zeros(3, 250, 400)
    rectangles = [(5, 10, 30, 40), (85, 60, 110, 90), (390, 240, 400, 250), (160, 100, 330, 230), (95, 150, 120, 176)]
    for left, top, right, bottom in rectangles:
        image[:, top:bottom, left:right] = 1
    assert spots._find(image)["boxes"].tolist() == [[160, 100, 330, 230]]  # the others are small
    spots.options["tile"] = 100
    found = spots._find(image)
    small = [r for r in rectangles if r != (390, 240, 400, 250)]
    assert sorted(map(tuple, found["boxes"].tolist())) == sorted(small)
    for box, mask in zip(found["boxes"].int().tolist(), found["masks"], strict=True):
        left, top, right, bottom = box
        assert mask.shape == (1, 250, 400) and mask[0, top:bottom, left:right].all()
        assert mask.sum() == (right - left) * (bottom - top)
    assert max(max(size) for size in spots.model.seen[2:]) == 100
    spots.options["tile"] = 400
    assert len(spots._find(image)["boxes"]) == 1


@pytest.mark.slow
def test_tiles_are_an_option_of_detectors(runs, tmp_path, capsys):  # noqa: F811
    image = runs / "images" / "a" / "1.png"
    words = [image, "--device", "cpu", "--json", "--out", tmp_path, "--score-threshold", "0.01"]
    plain, tiled = (
        json.loads(gmf(capsys, "predict", runs / "detector", *words, *more).out)["images"][0]["objects"]
        for more in ([], ["--tile", "64"])
    )
    assert len(tiled) > 0 and tiled != plain and all(0 <= v <= 150 for o in tiled for v in o["box"])
    assert "--tile is for detection" in gmf(capsys, "predict", runs / "classifier", image, "--tile", "64", code=2).err
