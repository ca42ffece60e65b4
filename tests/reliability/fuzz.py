"""Fuzzing of what reads users' files with atheris, which is not among the requirements; by hand, not in CI:

    pip install atheris
    python tests/reliability/fuzz.py --target images --minutes 15 --out images.json -timeout=120 -rss_limit_mb=3072 CORPUS

Targets are weights, config (config.json beside right weights: loaded, and an image predicted), annotations (COCO, YOLO, Pascal
VOC, CVAT, labelme: one file of a data set) and images. The minutes are of processor time. The first byte of an input of weights
says what the rest is: a file as it is, safetensors, or the pickle inside an archive with a checksum that is right; of
annotations, which file. The only answers allowed are a right one and an error of one line with a path; nothing may take 10 s of
processor time, which libFuzzer does not measure, or 3 GB.
"""

import argparse
import io
import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
INSTRUMENTED = ["groupmixformer", "pickle", "pickletools", "zipfile", "PIL", "json", "xml.etree", "yaml"]
with atheris.instrument_imports(include=INSTRUMENTED, exclude=["groupmixformer.models.mixers", "groupmixformer.ops"]):
    import pickle  # noqa: F401
    import pickletools  # noqa: F401

    import numpy as np
    import safetensors.torch
    import torch
    from test_damaged_formats import JSON, WORDS, damage, folders, objects
    from test_damaged_images import saved

    from groupmixformer import GroupMixFormer, run_folder, weights
    from groupmixformer.data.images import image_sizes, read_image
    from groupmixformer.models.checkpoint import save_checkpoint
    from groupmixformer.run import Run

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16), "c": torch.nn.Parameter(torch.ones(1))}


class Weights:
    """Files of weights."""

    def __init__(self):
        new, old = io.BytesIO(), io.BytesIO()
        torch.save(TENSORS, new)
        torch.save({"state_dict": TENSORS, "epoch": 1}, old, _use_new_zipfile_serialization=False)
        with zipfile.ZipFile(new) as target:
            pickled = target.read(next(name for name in target.namelist() if name.endswith("data.pkl")))
        plain = {name: tensor.detach() for name, tensor in TENSORS.items()}
        contents = (new.getvalue(), old.getvalue(), safetensors.torch.save(plain), pickled)
        self.seeds = [bytes([max(0, number - 1)]) + content for number, content in enumerate(contents)]

    def archive(self, pickled):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as target:
            target.writestr("a/data.pkl", pickled)
            for key in "012":
                target.writestr(f"a/data/{key}", bytes(24 >> int(key)))
        return file.getvalue()

    def read(self, data):
        kind, content = data[0] % 3, data[1:]
        path = FOLDER / ("a.safetensors" if kind == 1 else "a.pth")
        path.write_bytes(self.archive(content) if kind == 2 else content)
        tensors = weights.read_tensors(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content) + 1e9
        for tensor in tensors.values():
            tensor.clone()


class Config:
    """The config.json of a classifier, from which it is made and an image prepared."""

    def __init__(self):
        run_folder.MAX_SIDE = 256  # larger images only take longer
        stages = {"embed_dims": (10, 10), "depths": (1, 1), "mlp_ratios": (1, 1), "num_classes": 2}
        config = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "crop_pct": 0.9}
        self.seeds = []
        for more in ({}, {"mixer": "pool"}):
            save_checkpoint(GroupMixFormer(**stages, **more), FOLDER / "run", ["cat", "dog"], config)
            self.seeds.append((FOLDER / "run" / "config.json").read_bytes())
        save_checkpoint(GroupMixFormer(**stages), FOLDER / "run")
        content = json.loads(self.seeds[0])
        self.seeds.append(json.dumps({**content, "problem_type": "multi_label_classification", "best_threshold": 0.5}).encode())
        adapter = {"kind": "lora", "rank": 2, "alpha": None, "targets": ["qkv"]}
        self.seeds.append(
            json.dumps({**content, "adapter": {**adapter, "base": {"source": "x", "path": "../run", "checksum": "0"}}}).encode()
        )
        image = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        self.image = FOLDER / "image.png"
        read_image.__globals__["Image"].fromarray(image).save(self.image)

    def read(self, data):
        (FOLDER / "run" / "config.json").write_bytes(data)
        result = Run.open(FOLDER / "run").predict(self.image, device="cpu").result
        json.dumps(result, allow_nan=False)


class Annotations:
    """One file of a data set; those of other images stay."""

    def __init__(self):
        self.files = [
            file
            for root, _ in folders().values()
            for file in sorted(root.rglob("*"))
            if file.suffix in (".json", ".xml", ".txt", ".yaml") and "val" not in file.stem
        ]
        self.roots = {file: root for root, _ in folders().values() for file in self.files if root in file.parents}
        self.before = {file: file.read_bytes() for file in self.files}
        self.seeds = [bytes([number]) + self.before[file] for number, file in enumerate(self.files)]

    def read(self, data):
        file = self.files[data[0] % len(self.files)]
        file.write_bytes(data[1:])
        try:
            objects(self.roots[file])
        finally:
            file.write_bytes(self.before[file])


class Images:
    """Image files of any format."""

    def __init__(self):
        self.seeds = [saved(np.random.default_rng(number))[0] for number in range(200)]

    def read(self, data):
        path = FOLDER / "a.png"
        path.write_bytes(data)
        image = read_image(path)
        assert image.mode == "RGB" and image_sizes(path)[0] == image.size, (image.mode, image.size, image_sizes(path))


TARGETS = {"weights": Weights, "config": Config, "annotations": Annotations, "images": Images}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="of processor time")
    parser.add_argument("--out", type=Path, help="JSON file to write, as it goes")
    args, rest = parser.parse_known_args()
    target = TARGETS[args.target]()
    if rest and not rest[-1].startswith("-") and not Path(rest[-1]).is_file():  # which is tried alone
        folder = Path(rest[-1])
        folder.mkdir(exist_ok=True, parents=True)
        for number, content in enumerate(target.seeds):
            (folder / f"seed{number}").write_bytes(content)
    began, told = time.process_time(), {"target": args.target, "inputs": 0, "read": 0, "slowest": 0.0}

    def tell(end):
        told["processor_minutes"] = round((time.process_time() - began) / 60, 2)
        told["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if args.out:
            args.out.write_text(json.dumps(told))
        if end:
            print(json.dumps(told), flush=True)
            os._exit(0)

    def test_one_input(data):
        start = time.process_time()
        try:
            target.read(data or b"\0")
            told["read"] += 1
        except (ValueError, OSError) as error:
            if "\n" in str(error) or "/" not in str(error):
                raise AssertionError(repr(str(error))) from error
        told["inputs"] += 1
        took = round(time.process_time() - start, 2)
        assert took < 10, took
        told["slowest"] = max(told["slowest"], took)
        if told["inputs"] % 200 == 0:
            tell(time.process_time() - began > 60 * args.minutes)

    def mutate(data, most, seed):
        """Put another value or word into a text, or change bytes as libFuzzer does."""
        rng = np.random.default_rng(seed)
        if rng.random() < 0.3 or len(data) < 8:
            return atheris.Mutate(data, most)
        first, text = (data[:1], data[1:]) if args.target == "annotations" else (b"", data)
        text = text.decode("utf-8", "replace")
        is_json = text.lstrip()[:1] in ("{", "[")
        pattern = r'-?\d+\.?\d*|"[^"]*"|\[[^\[\]]*\]|null|true' if is_json else r'[^\s,;:<>="/]+'
        try:
            return (first + damage(rng, text, JSON if is_json else WORDS, pattern))[:most]
        except ValueError:  # no such word is left
            return atheris.Mutate(data, most)

    of_text = {"custom_mutator": mutate} if args.target in ("config", "annotations") else {}
    atheris.Setup([sys.argv[0], *rest], test_one_input, **of_text)
    atheris.Fuzz()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
