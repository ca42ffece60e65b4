"""The code blocks of README and docs run: Python as it stands, `gmf` commands through the command line."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from groupmixformer import GroupMixFormer
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.models.groupmixformer import checkpoint_filter_fn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXHAUSTIVE = {"data.md", "detect.md", "learning.md", "onnxruntime.md", "segment.md", "torchvision.md"}
SLOW = EXHAUSTIVE | {
    "checkpoints.md",
    "compare.md",
    "evaluate.md",
    "explain.md",
    "export.md",
    "lightning.md",
    "smp.md",
}
SLOW |= {"speed.md", "timm.md", "train.md", "transformers.md", "tune.md"}


def marks(page):
    return [pytest.mark.slow] * (page in SLOW) + [pytest.mark.exhaustive] * (page in EXHAUSTIVE)


@pytest.fixture
def workplace(tmp_path, monkeypatch, as_released):
    """A folder with what the pages speak of: a released checkpoint, an image, an image folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GMF_WEIGHTS", str(tmp_path))
    state_dict = timm.create_model("groupmixformer_small").state_dict()
    released = as_released(state_dict)
    assert list(checkpoint_filter_fn(released)) == list(state_dict)
    torch.save({"model": released}, "groupmixformer_small.pth")
    images, labels = load_digits(return_X_y=True)
    for digit in (0, 1):
        for i, pixels in enumerate(images[labels == digit][:16].reshape(-1, 8, 8)):
            folder = Path("photos", "train" if i < 12 else "val", str(digit))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    for digit in "01":
        shutil.copytree(Path("photos", "train", digit), Path("flowers", digit))
    Path("pets", "images").mkdir(parents=True)
    lines = ["image,round,straight"]
    for i, pixels in enumerate(images[:24].reshape(-1, 8, 8)):
        lines.append(f"{i}.png,{int(labels[i] in (0, 2, 3, 5, 6, 8, 9))},{int(labels[i] in (1, 2, 4, 5, 7))}")
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((64, 64)).save(Path("pets", "images", f"{i}.png"))
    Path("pets", "labels.csv").write_text("\n".join(lines))
    Image.fromarray((images[0].reshape(8, 8) * 15.9).astype(np.uint8)).resize((64, 64)).save("photo.jpg")
    _write_scenes(tmp_path)
    return tmp_path


def _write_scenes(root):
    """Discs on noise, annotated twice: `shapes` in COCO's form, `regions` with a class for every pixel."""
    rng = np.random.default_rng(0)
    classes = [{"id": 0, "name": "ground", "color": [0, 90, 0]}, {"id": 1, "name": "disc", "color": [200, 0, 0]}]
    disc_category = {"id": 7, "name": "disc", "keypoints": ["left", "right"]}
    (root / "shapes" / "annotations").mkdir(parents=True)
    (root / "shapes" / "images").mkdir()
    for split, number in (("train", 4), ("val", 3)):
        images, annotations = [], []
        for i in range(number):
            (x, y), radius = rng.integers(20, 50, 2).tolist(), 12
            disc = np.hypot(*(np.mgrid[:70, :80] - np.array([y, x])[:, None, None])) < radius
            pixels = rng.integers(0, 90, (70, 80, 3), dtype=np.uint8)
            pixels[disc] = (220, 60, 60)
            images.append({"id": i + 1, "file_name": f"{split}{i}.png", "width": 80, "height": 70})
            corners = [[x - radius, y - radius, x + radius, y - radius, x + radius, y + radius, x - radius, y + radius]]
            box = [x - radius, y - radius, 2 * radius, 2 * radius]
            shape = {"bbox": box, "segmentation": corners, "keypoints": [x - radius, y, 2, x + radius, y, 2]}
            annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 7, **shape})
            for kind, content in (("images", pixels), ("masks", disc.astype(np.uint8))):
                (root / "regions" / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(root / "regions" / kind / split / f"{i}.png")
            Image.fromarray(pixels).save(root / "shapes" / "images" / f"{split}{i}.png")
        content = {"images": images, "annotations": annotations, "categories": [disc_category]}
        (root / "shapes" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    (root / "regions" / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": 255}))


def _write_tiny():
    """Put a tiny classifier into runs/photos: to export a variant in every format takes minutes."""
    model = GroupMixFormer(embed_dims=(10, 20, 20, 30), depths=(1,) * 4, mlp_ratios=(2,) * 4, num_classes=2)
    save_checkpoint(model, "runs/photos", ["zero", "one"], {"input_size": (3, 32, 32)})


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks(page.name), id=page.name) for page in PAGES])
def test_code_blocks_run(page, workplace):
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks or page.name in ("api.md", "reliability.md")  # filled by mkdocstrings; commands of many minutes
    if page.name == "onnxruntime.md":
        _write_tiny()
        assert main(["export", "runs/photos", "--format", "onnx", "--out", "photos.onnx"]) == 0
    names = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
        elif page.name != "README.md":  # the README's commands train for minutes: .ci/run and the next test run them
            for line in block.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
                if page.name == "export.md" and line.startswith("gmf train"):
                    _write_tiny()


def test_the_readme_names_commands_that_parse(workplace, capsys):
    """Each `gmf` line of the README is understood: its options exist (the run itself is left out)."""
    from groupmixformer.cli.main import parse

    lines = re.findall(r"^gmf .*$", (ROOT / "README.md").read_text(), re.M)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            assert main([*words, "--print"]) == 0
        else:
            parse(words)


def test_links_point_at_files():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_nothing_names_a_path_of_a_machine():
    home = os.sep + "work" + os.sep
    for page in PAGES:
        assert home not in page.read_text()
