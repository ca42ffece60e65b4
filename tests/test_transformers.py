"""transformers takes our folders as classifiers, and our variants as backbones of its own segmenters and detectors."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from groupmixformer import GroupMixFormer, load_checkpoint
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.tasks.classification.predict import Classes

transformers = pytest.importorskip("transformers")

WIDTHS = (10, 20, 40, 30)
STAGES = {"embed_dims": WIDTHS, "depths": (1, 2, 2, 1), "mlp_ratios": (2.5, 1, 1.5, 3)}
NAMES = ["zero", "one", "two"]


@pytest.fixture
def folder(randomise, tmp_path):
    model = randomise(GroupMixFormer(**STAGES, num_classes=3)).eval()
    save_checkpoint(model, tmp_path / "run", NAMES, {"input_size": (3, 64, 64), "crop_pct": 0.9})
    return tmp_path / "run"


# Classifiers


@pytest.mark.slow  # half of it imports; test_checkpoint.py has a shorter one
def test_pipeline_is_our_prediction(folder):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    answer = transformers.pipeline("image-classification", model=str(folder))([photo, photo.rotate(90)], top_k=3)
    ours = Classes(folder, torch.device("cpu"))
    for got, image in zip(answer, (photo, photo.rotate(90)), strict=True):
        expected = ours.predict(image).result["classes"]
        assert [item["label"] for item in got] == [item["class"] for item in expected]
        assert [item["score"] for item in got] == pytest.approx([item["probability"] for item in expected], rel=1e-4)


@pytest.fixture
def tuned(folder):
    """The folder's model in transformers with a new classifier, as its fine-tuning begins."""
    names = {"num_labels": 2, "id2label": {0: "dark", 1: "bright"}, "label2id": {"dark": 0, "bright": 1}}
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **names)
    model.config.label_names = ["dark", "bright"]
    return model


def assert_it_comes_back(saved, wrapped, names):
    images = torch.randn(2, 3, 64, 45)
    expected = wrapped.eval()(images).logits
    loaded = load_checkpoint(saved)
    torch.testing.assert_close(loaded(images), expected)  # transformers leaves weights where the file has them, unaligned
    assert loaded.pretrained_cfg.get("label_names") == names
    assert torch.equal(timm.create_model(f"local-dir:{saved}", pretrained=True).eval()(images), loaded(images))


def test_what_transformers_saves_comes_back(tuned, tmp_path):
    tuned.save_pretrained(tmp_path / "saved")
    assert_it_comes_back(tmp_path / "saved", tuned, ["dark", "bright"])
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert again.config.id2label == {0: "dark", 1: "bright"}


def test_names_of_a_classifier_that_was_replaced_are_not_kept(folder, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["label_names"] == NAMES, "transformers keeps them"
    assert_it_comes_back(tmp_path / "saved", model, None)


@pytest.mark.slow
def test_trainer_fine_tunes(tuned, tmp_path):
    pytest.importorskip("accelerate")
    labels = torch.arange(16) % 2
    pixels = torch.randn(16, 3, 48, 48) + 2 * labels[:, None, None, None]
    data = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels.tolist(), strict=True)]
    settings = transformers.TrainingArguments(
        output_dir=tmp_path / "out",
        per_device_train_batch_size=8,
        max_steps=24,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(tuned, settings, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 24 and all(np.isfinite(losses))
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(tmp_path / "saved")
    assert_it_comes_back(tmp_path / "saved", tuned, ["dark", "bright"])


# Backbones


def backbone_config(name, stages):
    return transformers.TimmBackboneConfig(backbone=name, out_indices=list(stages))


def upernet(name, size):
    config = transformers.UperNetConfig(
        backbone_config=backbone_config(name, range(4)),
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=WIDTHS[2],  # of the stage of stride 16
        auxiliary_channels=16,
        num_labels=3,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    return model, model.backbone._backbone, {"labels": torch.randint(0, 3, (2, *size))}


def mask2former(name, size):
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}  # normalised in 32 groups
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config(name, range(4)),
        **width,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        train_num_points=64,
        num_labels=3,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    masks, classes = [torch.randint(0, 2, (2, *size)).float() for _ in range(2)], [torch.tensor([0, 2])] * 2
    return model, model.model.pixel_level_module.encoder._backbone, {"mask_labels": masks, "class_labels": classes}


OBJECTS = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.4]])}] * 2
TINY = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
TINY |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5, "num_labels": 3}


def detr(name, size):
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone_config(name, [3]), **TINY))
    return model, model.model.backbone.model, {"labels": OBJECTS}


def rt_detr(name, size):
    config = transformers.RTDetrConfig(
        backbone_config=backbone_config(name, (1, 2, 3)),
        encoder_in_channels=list(WIDTHS[1:]),
        encoder_hidden_dim=16,
        decoder_in_channels=[16, 16, 16],
        num_denoising=4,
        freeze_backbone_batch_norms=False,
        **TINY,
    )
    model = transformers.RTDetrForObjectDetection(config)
    return model, model.model.backbone.model._backbone, {"labels": OBJECTS}


# RT-DETR adds maps that it has doubled: sides must be multiples of 32. The others take any.
MODELS = [(upernet, (97, 130)), (mask2former, (97, 130)), (detr, (97, 130)), (rt_detr, (96, 160))]


@pytest.mark.parametrize(("make", "size"), MODELS, ids=lambda value: getattr(value, "__name__", None))
def test_a_training_step_reaches_the_whole_backbone(make, size, folder):
    model, backbone, targets = make(f"local-dir:{folder}", size)
    source = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    assert backbone.load_state_dict(source.state_dict(), strict=False).missing_keys == []
    images = torch.randn(2, 3, *size)
    expected = source.eval()(images)
    for got, stage in zip(backbone.eval()(images), model.config.backbone_config.out_indices, strict=True):
        torch.testing.assert_close(got, expected[stage], rtol=1e-4, atol=1e-4)  # DETR normalises in another order

    model.train()
    loss = model(pixel_values=images, **targets).loss
    loss.backward()
    assert loss.isfinite()
    parameters = dict(backbone.named_parameters())
    # DETR makes buffers of the weights of every BatchNorm; all else learns.
    norms = {
        f"{n}.{kind}" for n, m in source.named_modules() if isinstance(m, torch.nn.BatchNorm2d) for kind in ("weight", "bias")
    }
    learning = {name for name, _ in source.named_parameters()} - (norms if make is detr else set())
    assert set(parameters) == learning
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in parameters.values())
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert model(pixel_values=images, **targets).loss.isfinite()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), MODELS, ids=lambda value: getattr(value, "__name__", None))
def test_saved_and_loaded(make, size, folder, tmp_path):
    """transformers builds on the meta device and fills in what the file holds: nothing may stay empty."""
    model, _, _ = make(f"local-dir:{folder}", size)
    model.eval().save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        for got, expected in zip(again(images).to_tuple(), model(images).to_tuple(), strict=True):
            if torch.is_tensor(got):
                torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_a_variant_by_its_name():
    config = transformers.TimmBackboneConfig(backbone="groupmixformer_mobile", out_indices=[0, 1, 2, 3])
    backbone = transformers.AutoBackbone.from_config(config).eval()
    assert backbone.channels == [40, 80, 160, 160]
    maps = backbone(torch.randn(1, 3, 97, 130)).feature_maps
    assert [tuple(one.shape[1:]) for one in maps] == [(40, 25, 33), (80, 13, 17), (160, 7, 9), (160, 4, 5)]
