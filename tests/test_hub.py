"""What goes to a hub says what is known and nothing else, and comes back as the same model, over HTTP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from hub_server import TOKEN, serve

from groupmixformer import GroupMixFormer, load_checkpoint, push_to_hub
from groupmixformer.cli.main import main
from groupmixformer.deploy.hub import model_card, write_folder
from groupmixformer.models.checkpoint import load_model, save_checkpoint
from groupmixformer.training.recipe import read_recipe

STAGES = {"embed_dims": (10, 20, 40, 30), "depths": (1, 2, 2, 1), "mlp_ratios": (2.5, 1, 1.5, 3)}
IMAGES = torch.randn(2, 3, 64, 45, generator=torch.Generator().manual_seed(0))
FILES = ["README.md", "config.json", "model.safetensors", "recipe.yaml"]
METRICS = """epoch,step,lr,loss,val_images,val_loss,val_top1,skipped_steps,unreadable,seconds
0,3,0.1,2.0,360.0,1.25,0.5,0,0,3
1,6,0.1,1.5,360.0,0.75,0.925,0,0,6
2,9,0.1,1.0,360.0,0.5,0.925,0,0,9
"""


@pytest.fixture
def model(randomise):
    return randomise(GroupMixFormer(**STAGES, num_classes=3)).eval()


@pytest.fixture
def run(model, tmp_path):
    """A folder as `gmf train` leaves it, which holds much that is nobody's business."""
    folder = tmp_path / "run"
    save_checkpoint(model, folder, ["zero", "one", "two"], {"input_size": (3, 64, 64), "crop_pct": 0.9})
    recipe = {"data": "/home/someone/private/photos", "out": str(folder), "variant": "small", "epochs": 3}
    recipe |= {"checkpoint": "hf-hub:me/before@v1", "root": "https://me:secret@example.org/shards?key=secret"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "versions.json").write_text(
        json.dumps({"torch": "2.15.0", "platform": "host-17", "device": "x86 CPU, 1 threads"})
    )
    (folder / "checkpoints").mkdir()
    torch.save({"optimizer": 1}, folder / "checkpoints" / "last.ckpt")
    (folder / "report.html").write_text("images")
    return folder


def test_the_card_says_what_is_known(run):
    card = huggingface_hub.ModelCard(model_card(run, "me/digits", "mit"))
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("mit", "timm", "image-classification")
    assert card.data.base_model == "me/before"
    assert card.data.datasets is None, "the data set is not on the Hub"
    assert set(card.data.tags) == {"image-classification", "timm", "transformers", "groupmixformer"}
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-classification", "accuracy", 0.925)
    assert result.dataset_name == "photos, held-out part"
    for known in (
        "| top-1 accuracy | 92.50% |",
        "| loss (mean cross entropy, nats) | 0.7500 |",  # of the first of the two equal epochs, which is the one that is kept
        "360 images of photos, held-out part, after epoch 2 of 3",
        "| widths of the stages | 10, 20, 40, 30 |",
        "| MLP ratios | 2.5, 1, 1.5, 3 |",
        "| input | 3 x 64 x 64, bicubic, centre crop of 0.9 |",
        f"| parameters | {sum(p.numel() for p in load_checkpoint(run).parameters()) / 1e6:.2f} M |",
        "other widths and depths than the published ones",
        "Classes: zero, one, two.",
        "With torch 2.15.0, on x86 CPU, 1 threads.",
        "from `hf-hub:me/before@v1`",
        "Licence of these weights: mit.",
        'timm.create_model("hf-hub:me/digits", pretrained=True)',
    ):
        assert known in card.text, known


def test_no_path_or_secret_of_this_machine_is_published(run, tmp_path):
    assert write_folder(run, tmp_path / "out", "me/digits") == FILES
    for file in (tmp_path / "out").iterdir():
        for private in (b"someone", b"secret", b"host-17", os.fsencode(tmp_path)):
            assert private not in file.read_bytes(), file.name
    recipe = read_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert (recipe.data, recipe.out, recipe.root) == ("photos", "run", "https://example.org/shards")
    assert recipe.checkpoint == "hf-hub:me/before@v1"


def test_the_card_of_weights_alone_claims_nothing(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "small.pth")
    card = huggingface_hub.ModelCard(model_card(tmp_path / "small.pth", "me/small"))
    assert card.data.license == "unknown"
    assert card.data.eval_results is None and card.data.metrics is None and card.data.base_model is None
    for known in ("Nothing was measured", "How it was trained is not known", "Licence of these weights: not known."):
        assert known in card.text
    assert write_folder(tmp_path / "small.pth", tmp_path / "out", "me/small") == FILES[:3]


def test_a_published_variant_has_its_name(tmp_path):
    variant = timm.create_model("groupmixformer_mobile", num_classes=0)
    save_checkpoint(variant, tmp_path / "mobile")
    assert "| network | `groupmixformer_mobile` |" in model_card(tmp_path / "mobile", "me/mobile")


@pytest.mark.parametrize("data", ["hfds/uoft-cs/cifar10", "hfids/uoft-cs/cifar10"])
def test_data_of_the_hub_is_linked(run, data):
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": data}))
    card = huggingface_hub.ModelCard(model_card(run, "me/digits"))
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert card.data.eval_results[0].dataset_type == "uoft-cs/cifar10"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("hfids/scans/here", "hfids/scans/here"),
        ("hfids//home/someone/scans", "hfids/scans"),
        ("~/scans", "scans"),
        ("wds/https://me:word@example.org/shards?key=1", "wds/https://example.org/shards"),
        ("torch/cifar10", "torch/cifar10"),
    ],
)
def test_data_of_this_machine_is_not_linked(run, tmp_path, monkeypatch, data, shown):
    monkeypatch.chdir(tmp_path)
    Path("scans/here").mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"data": data}))
    card = huggingface_hub.ModelCard(model_card(run, "me/digits"))
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_type == shown


def test_another_network_of_timm(tmp_path):
    resnet = timm.create_model("resnet10t", num_classes=3).eval()
    save_checkpoint(resnet, tmp_path / "run", label_names=list("xyz"))
    assert write_folder(tmp_path / "run", tmp_path / "out", "me/resnet") == FILES[:3]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import groupmixformer" not in card and "Group-Mix" not in card
    assert torch.equal(load_model(tmp_path / "out")(IMAGES), resnet(IMAGES))


def test_the_folder_is_the_same_model(run, model, tmp_path):
    folder = tmp_path / "new" / "out"
    write_folder(run, folder, "me/digits")
    assert torch.equal(load_checkpoint(folder)(IMAGES), model(IMAGES))
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(IMAGES), model(IMAGES))
    assert load_checkpoint(folder).pretrained_cfg == load_checkpoint(run).pretrained_cfg
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_folder_with_something_in_it_is_left_alone(run, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    for folder in (run, run / "recipe.yaml"):
        with pytest.raises(ValueError, match="expected a new or empty folder"):
            write_folder(run, folder, "me/digits")
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert write_folder(run, tmp_path / "empty", "me/digits") == FILES


@pytest.mark.parametrize("repo_id", ["digits", "me/../digits", "me/digits/more", "me/a b"])
def test_wrong_names(run, tmp_path, repo_id):
    with pytest.raises(ValueError, match=r"user/digits|[Rr]epo"):
        write_folder(run, tmp_path / "out", repo_id)
    assert not (tmp_path / "out").exists()


def test_dry_run(run, tmp_path, capsys):
    assert main(["push", str(run), "me/digits", "--dry-run", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["files"], result["license"], result["repo_id"]) == (FILES, "unknown", "me/digits")
    assert "name that of the weights with --license" in said.err
    assert main(["push", str(run), "me/digits", "--dry-run", str(tmp_path / "again"), "--license", "mit"]) == 0
    assert "licence" not in capsys.readouterr().err
    assert "license: mit" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("run_name", ["nowhere", "empty"])
def test_no_such_run(tmp_path, capsys, run_name):
    (tmp_path / "empty").mkdir()
    assert main(["push", str(tmp_path / run_name), "me/digits", "--dry-run", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"gmf: error: {tmp_path / run_name}: ")
    assert not (tmp_path / "out").exists()


# Over HTTP


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which huggingface_hub takes for the hub."""
    with serve() as served:
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        huggingface_hub.close_session()
        yield served
    huggingface_hub.close_session()


def test_push_and_load(hub, run, model):
    url = push_to_hub(run, "me/digits", license="mit", token=TOKEN, private=True)
    sha = hub.branches["me/digits", "main"]
    assert url == f"{hub.url}/me/digits/commit/{sha}"
    assert hub.private == {"me/digits": True}
    assert sorted(hub.files("me/digits")) == [".gitattributes", *FILES]
    for name in ("hf-hub:me/digits", "hf-hub:me/digits@main", f"hf-hub:me/digits@{sha}"):
        loaded = load_checkpoint(name)
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        assert loaded.pretrained_cfg["label_names"] == ["zero", "one", "two"]
        assert torch.equal(timm.create_model(name, pretrained=True).eval()(IMAGES), model(IMAGES))
    features = timm.create_model("hf-hub:me/digits", pretrained=True, features_only=True).eval()(IMAGES)
    assert torch.equal(features[-1], model.forward_intermediates(IMAGES, intermediates_only=True)[-1])


def test_push_again_and_to_a_branch(hub, run, model):
    first = push_to_hub(run, "me/digits", token=TOKEN)
    hub.commit("me/digits", "next", {})
    torch.nn.init.ones_(model.norm.bias)
    save_checkpoint(model, run, ["zero", "one", "two"])
    push_to_hub(run, "me/digits", token=TOKEN, revision="next", commit_message="Ones")
    assert torch.equal(load_checkpoint("hf-hub:me/digits@next")(IMAGES), model(IMAGES))
    assert not torch.equal(load_checkpoint("hf-hub:me/digits")(IMAGES), model(IMAGES))
    assert push_to_hub(run, "me/digits", token=TOKEN) != first
    assert torch.equal(load_checkpoint("hf-hub:me/digits")(IMAGES), model(IMAGES)), "the newest, not what is cached"


def test_what_the_hub_refuses(hub, run):
    with pytest.raises(
        OSError, match=r"me/digits: cannot be uploaded: .*401.*; log in with `hf auth login`, or set HF_TOKEN"
    ) as told:
        push_to_hub(run, "me/digits")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r'me/digits: the hub refuses the upload: .*"license" must be one of') as told:
        push_to_hub(run, "me/digits", token=TOKEN, license="nonsense")
    assert "\n" not in str(told.value)
    with pytest.raises(OSError, match=r"me/digits: cannot be uploaded: .*no-such-branch"):
        push_to_hub(run, "me/digits", token=TOKEN, revision="no-such-branch")
    for name in ("me/nothing", "me/digits@no-such-branch"):
        with pytest.raises(OSError, match=f"hf-hub:{name}: cannot be fetched: ") as told:
            load_checkpoint(f"hf-hub:{name}")
        assert "\n" not in str(told.value)


def test_no_hub_there(hub, run, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "me/digits", "--license", "mit"]) == 1
    assert capsys.readouterr().err.startswith("gmf: error: me/digits: cannot be uploaded: ")


def test_offline(run):
    with pytest.raises(OSError, match=r"me/digits: cannot be uploaded: .*HF_HUB_OFFLINE"):
        push_to_hub(run, "me/digits", token=TOKEN)
    with pytest.raises(OSError, match="hf-hub:me/digits: cannot be fetched: "):
        load_checkpoint("hf-hub:me/digits")


# In a process of its own, as a user has it

SCRIPT = """
import sys
from groupmixformer.cli.main import main
run, image, images, logits = sys.argv[1:]
assert main(["push", run, "me/photos", "--license", "mit", "--json"]) == 0
assert main(["predict", "hf-hub:me/photos", image, "--json"]) == 0
import timm, torch, groupmixformer
from transformers import AutoModelForImageClassification
images = torch.load(images)
ours = groupmixformer.load_checkpoint("hf-hub:me/photos")
timms = timm.create_model("hf-hub:me/photos", pretrained=True).eval()
theirs = AutoModelForImageClassification.from_pretrained("me/photos").eval()
with torch.no_grad():
    torch.save([ours(images), timms(images), theirs(images).logits, list(theirs.config.id2label.values())], logits)
"""


@pytest.mark.slow
def test_a_real_run_over_http(photos, tmp_path):
    run = tmp_path / "run"
    options = "--variant mobile --epochs 1 --image_size 32 --batch_size 8 --crop_pct 1.0 --workers 0"
    assert main(["train", "folder", "--data", str(photos), "--out", str(run), *options.split()]) == 0
    torch.save(IMAGES, tmp_path / "images.pt")
    with serve() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        image = next((photos / "val" / "one").iterdir())
        command = [sys.executable, "-c", SCRIPT, run, image, tmp_path / "images.pt", tmp_path / "logits.pt"]
        said = subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.PIPE, text=True).stdout
    pushed, predicted = map(json.loads, said.splitlines())
    assert pushed["commit"] == f"{hub.url}/me/photos/commit/{hub.branches['me/photos', 'main']}"
    assert sorted(hub.files("me/photos")) == [".gitattributes", *FILES]
    expected = load_checkpoint(run)(IMAGES).detach()
    *logits, names = torch.load(tmp_path / "logits.pt")
    for other in logits:  # another process may have its weights aligned otherwise in memory, and round otherwise
        torch.testing.assert_close(other, expected)
    assert names == ["one", "zero"]
    assert predicted["images"][0]["classes"][0]["class"] in names
    card = huggingface_hub.ModelCard(hub.files("me/photos")["README.md"].decode())
    assert card.data.eval_results[0].dataset_name == f"{photos.name}, held-out part"
    assert "Measured on 16 images of" in card.text and "after epoch 1 of 1" in card.text
    assert str(Path(photos).parent) not in card.text


# Detectors and segmenters


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_scenes(task, tmp_path, hub):
    from groupmixformer.run_folder import save_network
    from groupmixformer.tasks.backbone import Backbone

    backbone = Backbone("groupmixformer_small", {name: list(value) for name, value in STAGES.items()})
    stored = {"name": backbone.name, "arguments": backbone.arguments}
    if task == "detection":
        from groupmixformer.tasks.detection.model import Detector, load_detector

        settings = {"num_classes": 2, "architecture": "retinanet", "image_size": 64, "max_size": 96, "fpn_channels": 16}
        made, load, more, column = Detector, load_detector, {"category_ids": [3, 7]}, "val_box_AP"
        images = [torch.rand(3, 70, 90)]
    else:
        from groupmixformer.tasks.segmentation.model import Segmenter, load_segmenter

        settings = {"num_classes": 2, "decoder": "fpn", "image_size": 64, "channels": 64, "auxiliary": False}
        made, load, more, column = (
            Segmenter,
            load_segmenter,
            {"class_ids": [0, 1], "colors": [[0, 0, 0], [9, 9, 9]]},
            "val_mIoU",
        )
        images = torch.rand(1, 3, 70, 90)
    network = made(backbone, **settings).eval()
    config = {"task": task, "class_names": ["cell", "disc"], **more, "network": {"backbone": stored, **settings}}
    save_network(network, tmp_path / "run", config)
    (tmp_path / "run" / "metrics.csv").write_text(f"epoch,{column},val_images,seconds\n0,0.25,3,1\n1,0.125,3,2\n")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"data": "scenes", "task": task}))
    push_to_hub(tmp_path / "run", "me/scenes", license="mit", token=TOKEN)
    assert sorted(hub.files("me/scenes")) == [".gitattributes", *FILES]
    loaded, told = load("hf-hub:me/scenes")
    assert told["class_names"] == ["cell", "disc"]
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), network(images), rtol=0, atol=0)
    card = huggingface_hub.ModelCard(hub.files("me/scenes")["README.md"].decode())
    assert card.data.library_name == "groupmixformer"
    assert card.data.pipeline_tag == {"detection": "object-detection", "segmentation": "image-segmentation"}[task]
    assert card.data.eval_results[0].metric_value == 0.25
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert f"| parameters | {parameters:.2f} M |" in card.text
    assert f"load_{task.replace('detection', 'detector').replace('segmentation', 'segmenter')}(" in card.text
