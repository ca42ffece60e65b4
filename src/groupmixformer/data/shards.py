"""Writes a data set as WebDataset shards, which stream from a disk or a URL."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write, to_json
from .images import decode, noted

Files = Sequence[tuple[str, int]]  # images and their classes


def write_shards(
    folder: Path,
    splits: Mapping[str, Files],
    class_names: Sequence[str],
    out: Path,
    per_shard: int,
    seed: int,
    workers: int,
    progress: Callable[[Any, str, int], Any],
) -> dict[str, Any]:
    """Write images as shards that timm's `wds/` reads too: the files unchanged, those for training in random order.

    Each image is decoded to see that it can be, and left out if not. `out` is written atomically:
    nothing is left of an interrupted call.

    Args:
        folder: Where the images lie; they are named relative to it.
        splits: Images of train and validation.
        class_names: In the order of the classes' numbers.
        out: Folder to write.
        per_shard: Images in a shard.
        seed: Of the order of the images for training.
        workers: Threads.
        progress: Called with the iterator over finished shards, a label and their number; yields them on.

    Returns:
        The number of images in each split, of `shards` and `bytes`, and `skipped`: a line for each image that was left out.

    Raises:
        ValueError: If `out` exists and is not empty.
    """
    from webdataset import TarWriter

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already: choose another folder with --out")
    jobs: list[tuple[str, int, Files]] = []
    for split, files in splits.items():
        order = np.random.default_rng(seed).permutation(len(files)) if split == "train" else range(len(files))
        files = [files[index] for index in order]
        jobs += [(split, first, files[first : first + per_shard]) for first in range(0, len(files), per_shard)]

    def write(job: tuple[str, int, Files]) -> tuple[str, str, int, list[str]]:
        split, first, files = job
        name, skipped = f"{split}-{first // per_shard:06d}.tar", []
        with (part / name).open("wb") as file, TarWriter(file, encoder=False, mtime=0) as shard:
            for number, (path, label) in enumerate(files, first):
                try:
                    with noted():  # the file stays as it is: whoever trains on it is told
                        decode(Path(path), path)
                    content = Path(path).read_bytes()
                except (OSError, ValueError) as error:
                    skipped.append(str(error))
                    continue
                suffix = Path(path).suffix[1:].lower() or "img"
                suffix = "jpg" if suffix in ("jfif", "jpe", "jpeg") else suffix  # timm looks for jpg, png and webp
                notes = to_json({"filename": os.path.relpath(path, folder), "label": label})
                shard.write({"__key__": f"{number:08d}", suffix: content, "cls": str(label).encode(), "json": notes.encode()})
        return split, name, len(files) - len(skipped), skipped

    with atomic_write(out) as temporary:
        part = temporary / out.name
        part.mkdir()
        pool = ThreadPoolExecutor(workers)
        try:
            done = list(progress(pool.map(write, jobs), "writing shards", len(jobs)))
        finally:
            pool.shutdown(cancel_futures=True)
        info: dict[str, Any] = {"class_names": list(class_names), "splits": {}}
        for split in splits:
            written = [(name, length) for other, name, length, _ in done if other == split]
            info["splits"][split] = {
                "name": split,
                "num_samples": sum(length for _, length in written),
                "filenames": [name for name, _ in written],
                "shard_lengths": [length for _, length in written],
            }
        size = sum(path.stat().st_size for path in part.glob("*.tar"))
        (part / "_info.json").write_text(to_json(info, 1))
    counts = {split: info["splits"][split]["num_samples"] for split in splits}
    return {**counts, "shards": len(jobs), "bytes": size, "skipped": [line for *_, lines in done for line in lines]}
