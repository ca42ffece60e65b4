"""Files of weights: what is damaged, of the wrong size or not finite is refused, and what is read is what was written."""

import json
import multiprocessing
import pickle
import random
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from groupmixformer import GroupMixFormer, Run, load_checkpoint, load_detector, load_segmenter, weights
from groupmixformer.cli.main import main
from groupmixformer.files import Fields
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import RunFolder, _check_config, read_metrics
from groupmixformer.weights import EXPANSION, checksum, read_tensors, write_tensors

DATA = Path(__file__).parent / "data"
TENSORS = {"a": torch.arange(40.0).view(5, 8), "b": torch.arange(3), "c": torch.ones((), dtype=torch.bfloat16)}


def assert_refused(path, message, call=read_tensors, **options):
    with pytest.raises(ValueError, match=message) as caught:
        call(path, **options)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def assert_same(got, expected=TENSORS):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name], tensor), name


def zip_again(path, compression=zipfile.ZIP_DEFLATED, change=lambda name, data: data):
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_file_that_was_zipped_again_has_the_same_weights(tmp_path, compression):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path)
    zip_again(path, compression)
    assert_same(read_tensors(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_parameters(tmp_path, legacy):
    whole = torch.arange(24.0)
    expected = {
        "transposed": whole.view(4, 6).t(),
        "part": whole[5:9],
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "buffer": torch.nn.Buffer(torch.zeros(2)),
        "empty": torch.empty(0, 3),
        "half": torch.ones(3, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "double": torch.tensor(1 / 3, dtype=torch.float64),
        **{
            f"{dtype}": torch.ones(5, dtype=dtype)
            for dtype in (torch.complex64, torch.complex128, torch.int32, torch.int16, torch.int8)
        },
    }
    if not legacy:
        expected["bytes"] = torch.arange(6).to(torch.uint16)
    torch.save(expected, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert_same(read_tensors(tmp_path / "a.pth"), expected)


def test_a_change_of_a_mapped_tensor_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path)
    read_tensors(path)["a"].zero_()
    assert_same(read_tensors(path))


def test_a_storage_shorter_than_declared(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path)
    zip_again(path, zipfile.ZIP_STORED, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    assert_refused(path, "its storage 0 has 156 bytes, expected 160")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_shape_larger_than_the_storage(tmp_path, legacy):
    """PyTorch would make the storage longer, with whatever is in memory."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=not legacy)
    shape, larger = b"K\x03\x85", b"K\x07\x85"  # of a pickle: a tuple with 3, with 7
    if legacy:
        content = path.read_bytes()
        assert content.count(shape) == 1
        path.write_bytes(content.replace(shape, larger))
        assert_refused(path, "storage has wrong byte size")
    else:
        zip_again(path, zipfile.ZIP_STORED, lambda name, data: data.replace(shape, larger))
        assert_refused(path, "resize storage")


def test_a_shape_larger_than_a_compressed_storage(tmp_path):
    """PyTorch makes the storage longer where nothing is mapped."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(3.0)}, path)
    zip_again(path, change=lambda name, data: data.replace(b"K\x03\x85", b"K\x07\x85"))
    assert_refused(path, "its tensor a has 7 numbers, more than are stored for it|resize storage")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_more_numbers_than_are_stored(tmp_path):
    torch.save({"b": torch.ones(3), "a": torch.ones(1).expand(9, 9)}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", "its tensor a has 81 numbers, more than are stored for it")
    torch.save({"b": torch.ones(3), "a": torch.eye(9).to_sparse()}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", "its tensor a is sparse, expected a dense one")


def test_what_an_archive_may_hold(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.mkdir("a/data/empty")
    assert_same(read_tensors(path))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("data/0")), bytes(160))
    assert_refused(path, "it holds a part twice")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickle.dumps(b"bytes", protocol=3), "its pickle uses SHORT_BINBYTES, which torch.save does not"),
        (pickle.dumps("text", protocol=4), "its pickle uses FRAME, which torch.save does not"),
        (b"\x80\x02\x82\x01.", "its pickle uses EXT1, which torch.save does not"),
        (b"\x80\x02c__builtin__\nbytearray\nJ\x09\x00\x00\x00\x85R.", "it asks for memory that holds no tensor"),
        (b"\x80\x02" + b"}" * 30 + b".", "its pickle has more than 30 operations, which no checkpoint needs"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "it describes a storage in a way that torch.save does not"),
    ],
)
def test_what_a_pickle_may_hold(tmp_path, monkeypatch, pickled, message):
    monkeypatch.setattr(weights, "MAX_OPERATIONS", 30)
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(1)}, path)
    zip_again(path, zipfile.ZIP_STORED, lambda name, data: pickled if name.endswith(".pkl") else data)
    assert_refused(path, message)


def test_a_pickle_may_speak_of_a_bytearray(tmp_path):
    torch.save({"a bytearray": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pth")
    assert read_tensors(tmp_path / "a.pth").keys() == {"a bytearray", "b"}


def test_numbers_of_8_bits(tmp_path):
    tensors = {"a": torch.arange(4.0).to(torch.float8_e4m3fn), "b": torch.tensor([1.0, torch.nan]).to(torch.float8_e5m2)}
    torch.save(tensors, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", r"1 of 2 tensors hold NaN or infinite values: b \(1 of 2\): training")
    assert_same({"a": read_tensors(tmp_path / "a.pth", allow_nonfinite=True)["a"]}, {"a": tensors["a"]})


def test_the_checksum_stays_what_it_was():
    """Files that were saved hold it."""
    assert checksum(TENSORS) == "118c5cfc"
    assert checksum({}) == "00000000"


def test_a_file_may_take_a_gigabyte_more_than_its_size(tmp_path, monkeypatch):
    monkeypatch.delenv(EXPANSION, raising=False)
    path = tmp_path / "a.pth"
    path.write_bytes(bytes(50))
    weights._check_memory(50 + 10**9, path)
    with pytest.raises(weights._Refused, match="its 50 bytes unfold to 1,000,000,051, expected at most 1 GB more"):
        weights._check_memory(51 + 10**9, path)


def test_every_bit_of_a_zip_counts(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            found = read_tensors(path)
        except ValueError:
            refused += 1
        else:  # padding, times and the like
            assert_same(found)
    assert refused > 100


def test_the_part_of_a_zip_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path)
    stored = TENSORS["a"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(stored, stored[:-1] + b"?"))
    assert_refused(path, "it is damaged: the checksum of its part data/0 differs: copy or download it again")


def test_a_flipped_bit_of_saved_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(TENSORS, path)
    assert_same(read_tensors(path))
    assert_same(safetensors.torch.load_file(path))
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    assert_refused(path, "it is damaged: the checksum of its tensors differs")
    safetensors.torch.save_file(TENSORS, path)  # by others, who write none
    assert_same(read_tensors(path))


def test_timm_and_the_hub_take_folders_with_a_checksum(tmp_path, randomise):
    model = randomise(timm.create_model("resnet10t", num_classes=3)).eval()
    save_checkpoint(model, tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "crc32"}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_weights_that_are_not_finite(tmp_path, randomise, name, value):
    model = randomise(GroupMixFormer(embed_dims=(10,), depths=(1,), mlp_ratios=(1,), num_classes=2)).eval()
    model.norm.weight.data[3:5] = value
    weights, path = model.state_dict(), tmp_path / name
    torch.save(weights, path) if name.endswith("pth") else safetensors.torch.save_file(weights, path)
    message = r"1 of \d+ tensors hold NaN or infinite values: norm.weight \(2 of 10\): .*allow_nonfinite=True"
    assert_refused(path, message, load_checkpoint)
    assert_refused(path, message, lambda path: Run.open(path).load())
    loaded = load_checkpoint(path, allow_nonfinite=True).state_dict()
    assert torch.equal(loaded["norm.weight"].isfinite(), weights["norm.weight"].isfinite())
    Run.open(path, allow_nonfinite=True).load()


def test_the_first_tensors_that_are_not_finite_are_named(tmp_path):
    tensors = {name: torch.tensor([1.0, torch.nan]) for name in "abcd"}
    torch.save(tensors, tmp_path / "a.pth")
    assert_refused(
        tmp_path / "a.pth", r"4 of 4 tensors hold NaN or infinite values: a \(1 of 2\), b \(1 of 2\), c \(1 of 2\), \.\.\.: "
    )
    torch.save({name: tensors[name] for name in "abc"}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", r"a \(1 of 2\), b \(1 of 2\), c \(1 of 2\): training diverged")


def test_large_finite_weights_are_not_infinite(tmp_path):
    tensors = {"a": torch.full((4,), 3e38), "b": torch.full((9,), 6e4, dtype=torch.float16)}  # whose sums are
    torch.save(tensors, tmp_path / "a.pth")
    assert_same(read_tensors(tmp_path / "a.pth"), tensors)


# What unfolds to more than it should


def bomb_expanded(path):
    torch.save({"a": torch.ones(1).expand(9000, 9000)}, path)


def bomb_legacy(path):
    torch.save({"a": torch.ones(1).expand(9000, 9000)}, path, _use_new_zipfile_serialization=False)


def bomb_shared(path):
    tensor = torch.ones(1 << 18)
    torch.save({str(i): tensor for i in range(400)}, path)


def bomb_member(path):
    torch.save({"a": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data/9", "w", force_zip64=True) as member:
        for _ in range(15):
            member.write(bytes(1 << 24))


def bomb_pickle(path):
    torch.save({"a": torch.ones(1)}, path)
    zip_again(path, change=lambda name, data: b"\x80\x02" + b"}" * 3_000_000 + b"." if name.endswith(".pkl") else data)


def bomb_legacy_pickle(path):
    path.write_bytes(b"\x80\x02" + b"}" * 3_000_000 + b".")


def bomb_bytes(path):
    """A pickle that asks for two billion bytes."""
    torch.save({"a": torch.ones(1)}, path)
    call = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x94\x35\x77\x85R."
    zip_again(path, change=lambda name, data: call if name.endswith(".pkl") else data)


def bomb_header(path):
    path.write_bytes(struct.pack("<Q", 90_000_000) + b" " * 90_000_000)


def bomb_safetensors(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [9000, 9000], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def overlapping_safetensors(path):
    entry = {"dtype": "F32", "shape": [1 << 16], "data_offsets": [0, 1 << 18]}
    header = json.dumps({f"t{i}": entry for i in range(900)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(1 << 18))


BOMBS = {
    bomb_expanded: "a.pth",
    bomb_legacy: "a.pth",
    bomb_shared: "a.pth",
    bomb_member: "a.pth",
    bomb_bytes: "pytorch_model.bin",
    bomb_header: "a.safetensors",
    bomb_safetensors: "a.safetensors",
    overlapping_safetensors: "a.safetensors",
}
SLOW_BOMBS = {bomb_pickle: "a.pth", bomb_legacy_pickle: "a.pth"}  # a million operations are looked through


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB


def read_and_measure(path, said):
    before = peak()
    try:
        read_tensors(path)
        said.put("was read")
    except ValueError as error:
        said.put(str(error) if peak() - before < 150 else f"took {peak() - before} MB")


@pytest.mark.parametrize("write", [*BOMBS, *(pytest.param(write, marks=pytest.mark.slow) for write in SLOW_BOMBS)])
def test_bombs_are_refused_before_they_take_memory(tmp_path, monkeypatch, write):
    path = tmp_path / (BOMBS | SLOW_BOMBS)[write]
    write(path)
    monkeypatch.setenv(EXPANSION, "0.1")
    context = multiprocessing.get_context("fork")  # whose peak is its own
    said = context.SimpleQueue()
    process = context.Process(target=read_and_measure, args=(path, said))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "not a readable checkpoint" in said.get()


def test_the_limit_can_be_raised(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    zip_again(path)
    assert_same(read_tensors(path), {"a": torch.zeros(1 << 20)})
    monkeypatch.setenv(EXPANSION, "0.001")
    assert_refused(path, f"unfold to 4,194,.* at most 0.001 GB more than the file.*raise the environment variable {EXPANSION}")


# A file in a run's folder belongs to the run


@pytest.fixture
def run(tmp_path):
    """A run whose class names, image size and colours matter, with a last.ckpt of other weights."""
    torch.manual_seed(0)
    model = GroupMixFormer(embed_dims=(10,), depths=(1,), mlp_ratios=(1,), num_classes=3)
    config = {"input_size": (3, 48, 48), "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3), "std": (0.9, 0.8, 0.7)}
    folder = tmp_path / "run"
    save_checkpoint(model, folder, ["cat", "dog", "cow"], config)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    trained = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    model.head.fc.bias.data += torch.tensor([9.0, 0, 0])
    averaged = {f"average.module.{name}": tensor for name, tensor in model.state_dict().items()}
    (folder / "checkpoints").mkdir()
    state = {"pytorch-lightning_version": "2.6.6", "global_step": 7}
    torch.save(state | {"state_dict": trained | averaged}, folder / "checkpoints" / "last.ckpt")
    torch.save(state | {"state_dict": trained}, folder / "checkpoints" / "plain.ckpt")
    return folder


IMAGE = Path(DATA / "image.png")


def test_a_file_belongs_to_its_run(run, caplog):
    expected = Run.open(run).predict(IMAGE, device="cpu").result
    assert {found["class"] for found in expected["classes"]} == {"cat", "dog", "cow"}
    for name in ("model.safetensors", "pytorch_model.bin", "checkpoints/plain.ckpt"):
        opened = Run.open(run / name)
        assert opened.predict(IMAGE, device="cpu").result == expected, name
        assert opened.path == run
    assert "plain.ckpt: took the weights after step 7" in caplog.text
    assert load_checkpoint(run / "checkpoints" / "last.ckpt").pretrained_cfg["input_size"] == (3, 48, 48)
    (best, *_) = Run.open(run / "checkpoints" / "last.ckpt").predict(IMAGE, device="cpu").result["classes"]
    assert (best["class"], best["probability"] > 0.9) == ("cat", True)
    assert "last.ckpt: took the EMA weights after step 7" in caplog.text


def test_a_file_elsewhere_belongs_to_no_run(run, tmp_path):
    for path in (tmp_path / "model.safetensors", run / "other.safetensors"):
        shutil.copyfile(run / "model.safetensors", path)
        assert RunFolder(path).config == {}
        assert load_checkpoint(path).pretrained_cfg["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("task", ["detection", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_a_detectors_last_checkpoint(tmp_path, task):
    run = shutil.copytree(DATA / task, tmp_path / "run")
    expected = Run.open(run).predict(IMAGE, device="cpu").result
    weights = safetensors.torch.load_file(run / "model.safetensors")
    (run / "checkpoints").mkdir()
    state = {f"average.module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, run / "checkpoints" / "last.ckpt")
    (run / "model.safetensors").unlink()
    opened = Run.open(run / "checkpoints" / "last.ckpt")
    assert opened.predict(IMAGE, device="cpu").result == expected


# What stands beside the weights


WRONG = [None, "text", 0.003, float("nan"), -1, 1e30, 40000, True, [], ["text"], [None], {}, {"text": 1}]


def fields(values, *above):
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from fields(value, *above, name)


def changed(values, place, value):
    copy = json.loads(json.dumps(values))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


def outcome(run):
    try:
        opened = Run.open(run)
        result = opened.predict(IMAGE, device="cpu").result
        return json.dumps([result, opened.class_names])
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    return "refused" if "\n" not in said and ("config.json" in said or "cannot be loaded" in said) else said


def test_categories_of_a_detector_may_have_texts_as_ids(tmp_path):
    run = shutil.copytree(DATA / "detection", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    ids = [f"category {number}" for number in config["category_ids"]]
    for wrong in (ids[1:], [*ids[1:], True]):
        (run / "config.json").write_text(json.dumps(config | {"category_ids": wrong}))
        assert_refused(run, f"config.json: category_ids is .*, expected a list of {len(ids)} integers or texts", load_detector)
    (run / "config.json").write_text(json.dumps(config | {"category_ids": ids}))
    assert load_detector(run)[1]["category_ids"] == ids


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection", pytest.param("segmentation", marks=pytest.mark.exhaustive)])
def test_no_field_of_config_is_taken_for_what_it_is_not(tmp_path, task):
    run = shutil.copytree(DATA / task, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    right = outcome(run)
    assert right != "refused"
    results = {}
    rng = random.Random(0)
    for place in fields(config):
        (run / "config.json").write_text(json.dumps(changed(config, place, KeyError)))
        without = outcome(run)
        for value in WRONG if task == "classification" else rng.sample(WRONG, 5):
            (run / "config.json").write_text(json.dumps(changed(config, place, value)))
            results[place, str(value)] = outcome(run) in ("refused", right, without)
    assert len(results) >= 90
    assert [key for key, fine in results.items() if not fine] == []


@pytest.mark.parametrize(
    ("task", "place", "value", "message"),
    [
        (
            "classification",
            ["pretrained_cfg", "input_size"],
            [3, 40000, 40000],
            r"pretrained_cfg: input_size is \[3, 40000, 40000\], .*from 1 to 4096",
        ),
        (
            "classification",
            ["pretrained_cfg", "input_size"],
            [3, 31, 32],
            r"input_size is \[3, 31, 32\], expected height and .* 32",
        ),
        ("classification", ["pretrained_cfg", "crop_pct"], 0, "crop_pct is 0, expected a finite number from 0.01 to 2"),
        ("classification", ["pretrained_cfg", "std"], [1, 0, 1], r"std is \[1, 0, 1\]"),
        ("classification", ["pretrained_cfg", "mean"], [float("nan")] * 3, r"mean is \[NaN"),
        ("classification", ["pretrained_cfg", "mean"], [1, 2], r"mean is \[1, 2\], expected a number for each of 3 channels"),
        ("classification", ["num_classes"], 9, "config.json has num_classes 9, and the weights are for 10"),
        ("classification", ["task"], 5, "task is 5, expected a text"),
        ("classification", ["task"], "detektion", "no task detektion.*detection"),
        ("detection", ["class_names"], "square", 'class_names is "square", expected a list of texts'),
        ("detection", ["category_ids"], [3], r"category_ids is \[3\], expected a list of 2 integers"),
        ("detection", ["network", "image_size"], "64", 'network: image_size is "64", expected an integer from 1 to 4096'),
        ("detection", ["network", "num_classes"], 3, "num_classes is 3, and class_names has 2"),
        ("detection", ["network", "width"], 60000, "misshapen tensors"),
        ("detection", ["network", "backbone", "arguments", "depths"], [1, 1, 1, 10**9], "arguments: depths is"),
        ("segmentation", ["colors"], [[0, 0, 999]] * 3, "colors are"),
        (
            "segmentation",
            ["class_ids"],
            [1, 2, 300],
            r"class_ids is \[1, 2, 300\], expected a list of 3 integers from 0 to 255",
        ),
        ("segmentation", ["network", "auxiliary"], "yes", "auxiliary is"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, task, place, value, message):
    run = shutil.copytree(DATA / task, tmp_path / "run")
    (run / "config.json").write_text(json.dumps(changed(json.loads((run / "config.json").read_text()), place, value)))
    load = {"classification": load_checkpoint, "detection": load_detector, "segmentation": load_segmenter}[task]
    with pytest.raises(ValueError, match=message) as caught:
        Run.open(run) and load(run)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value) or message == "misshapen tensors"


@pytest.mark.slow
def test_every_configuration_of_timm_is_taken():
    for name in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(name).to_dict()
        present = {key: value for key, value in json.loads(json.dumps(cfg)).items() if value is not None}
        _check_config(Fields({"architecture": cfg["architecture"], "pretrained_cfg": present}, name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,loss\n0,\n", "line 2: loss is '', expected a number"),
        ("epoch,loss\n0\n", "line 2: loss is None, expected a number"),
        ("epoch,loss\n0,1\n1,2,3\n", r"line 3: .* is \['3'\], expected a number"),
        ("epoch,loss\nzero,1\n", "line 2: epoch is 'zero', expected a number"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_wrong_metrics(tmp_path, text, message):
    (tmp_path / "metrics.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(tmp_path / "metrics.csv", message, lambda path: read_metrics(path.parent))
    assert_refused(tmp_path / "metrics.csv", message, lambda path: RunFolder(path.parent).metrics)


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "expected an object"), ('{"torch": 2}', "torch is 2, expected a text"), ("{", "not JSON")]
)
def test_wrong_versions(tmp_path, text, message):
    (tmp_path / "versions.json").write_text(text)
    assert_refused(tmp_path / "versions.json", message, lambda path: RunFolder(path.parent).versions)


def test_commands_refuse_weights_that_are_not_finite(run, tmp_path, capsys):
    weights = safetensors.torch.load_file(run / "model.safetensors")
    weights["norm.bias"][0] = float("nan")
    write_tensors(weights, run / "model.safetensors")
    calls = {
        "predict": ["predict", str(run), str(IMAGE), "--device", "cpu"],
        "convert": ["convert", str(run), "--out", str(tmp_path / "converted")],
        "push": ["push", str(run), "me/model", "--dry-run", str(tmp_path / "card")],
    }
    for name, words in calls.items():
        assert main(words) == 1, name
        assert "norm.bias (1 of 10): " in capsys.readouterr().err
        assert main([*words, "--allow-nonfinite"]) == 0, name
    assert main(["train", "digits", "--checkpoint", str(run), "--out", str(tmp_path / "new"), "--epochs", "1"]) == 1
    assert "norm.bias (1 of 10): " in capsys.readouterr().err


def test_a_command_says_which_weights_it_took(run, capsys):
    assert main(["predict", str(run / "checkpoints" / "last.ckpt"), str(IMAGE), "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "took the EMA weights after step 7" in err
    assert "took the EMA weights after step 7" in json.loads(out)["notes"][0]
