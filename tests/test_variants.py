"""The variants at full size: released checkpoints of each, and many random images. Slow: large models."""

import json

import pytest
import timm
import torch
from PIL import Image

from groupmixformer import load_checkpoint
from groupmixformer.cli.main import main
from groupmixformer.models.groupmixformer import VARIANTS


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * ("base" in name or "large" in name)) for name in VARIANTS]
)
def test_a_released_checkpoint_of_each_variant_predicts(name, tmp_path, capsys, as_released, randomise):
    model = randomise(timm.create_model(name)).eval()
    state_dict = model.state_dict()
    path = tmp_path / "released.pth"
    torch.save({"model": as_released(state_dict)}, path)
    loaded = load_checkpoint(path)
    assert loaded.pretrained_cfg["architecture"] == name.removesuffix("_384")  # the tensors do not tell the image size
    images = torch.randn(1, 3, 101, 64)
    assert torch.equal(loaded(images), model(images))
    Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 100).save(tmp_path / "image.png")
    assert main(["predict", str(path), str(tmp_path / "image.png"), "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["images"][0]["classes"]
    assert len(classes) == 5
    assert all(isinstance(row["class"], str) and 0 <= row["probability"] <= 1 for row in classes)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_200_random_forward_passes():
    generator = torch.Generator().manual_seed(0)
    models = [timm.create_model(name, num_classes=3).eval() for name in VARIANTS]
    for _ in range(200):
        model = models[int(torch.randint(len(models), (), generator=generator))]
        height, width = torch.randint(32, 161, (2,), generator=generator).tolist()
        batch = int(torch.randint(1, 4, (), generator=generator))
        with torch.inference_mode():
            logits = model(torch.randn(batch, 3, height, width))
        assert logits.shape == (batch, 3)
        assert logits.isfinite().all(), (height, width)
