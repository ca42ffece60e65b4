"""Sources of streams: WebDataset shards (`wds/`) and Hugging Face (`hfids/`), read in order and not decoded."""

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from ..files import Fields
from .images import IMAGE_SUFFIXES, OTHER_SUFFIXES, is_image, is_leftover

SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}
MAX_PARTS = 256  # into which a Hugging Face set without parquet files is divided; their order is shuffled
MAX_ATTEMPTS = 3  # to fetch a file by URL: networks fail now and then

Sample = tuple[bytes | Path | None, Any, str]  # an image's file or what is in it, its class as stored, its name in messages


class Source(Protocol):
    """One split of a data set, in shards of known length.

    Attributes:
        class_names: Names of the classes.
        shards: Names of the shards in messages.
        lengths: Number of samples in each shard.
    """

    class_names: list[str]
    shards: list[str]
    lengths: list[int]

    def read(self, shard: int, start: int) -> Iterator[Sample]:
        """Yield the samples of a shard, without the first `start`.

        Raises:
            ValueError: If the shard is damaged or cannot be read.
        """


def _first_line(error: Exception) -> str:
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)  # webdataset adds arguments,
    lines = text.split(" @ ")[0].splitlines()  # and " @ " with an object's address
    return lines[0] if lines else type(error).__name__


def _choose(splits: Iterable[str], split: str, place: str) -> str:
    chosen = next((name for name in SPLITS[split] if name in splits), None)
    if chosen is None:
        raise ValueError(f"{place}: has no split {split}, only {', '.join(splits)}")
    return chosen


@contextmanager
def _opened(location: str) -> Iterator[IO[bytes]]:
    """Open a local file, or a copy of a remote one: a connection held open while training reads from it would break.

    Remote files come through fsspec: webdataset's opener passes URLs to other programs, those of `pipe:` to a shell.
    """
    if "://" not in location:
        with Path(location).open("rb") as file:
            yield file
        return
    from fsspec.core import url_to_fs

    system, path = url_to_fs(location)
    with tempfile.NamedTemporaryFile() as copy:
        for left in reversed(range(MAX_ATTEMPTS)):
            try:
                system.get_file(path, copy.name)
                break
            except FileNotFoundError:
                raise
            except Exception:  # each network library has its own
                if not left:
                    raise
                time.sleep(1)
        yield copy


class WebDataset:
    """A split of shards that timm's `wds/` reads too: tar files, and `_info.json` with the number of samples in each.

    Args:
        name: What follows ``wds/``: a URL, or a folder or anything in `root`.
        root: Folder or URL of the shards, or of the folder `name`.
        split: train or validation.

    Raises:
        ValueError: If there is no `_info.json`, if it is damaged, or if a shard is missing.
    """

    def __init__(self, name: str, root: str, split: str) -> None:
        place, info = _read_info(name, root)
        self.class_names, splits = info.texts("class_names"), info.object("splits")
        chosen = splits.object(_choose(splits.values, split, place))
        self.shards = [file if "://" in file else f"{place}/{file}" for file in chosen.texts("filenames")]
        self.lengths = chosen.integers("shard_lengths", low=0)
        self.label = chosen.text("alt_label", default=None)  # timm's: the class is this field of the .json, not the .cls
        if len(self.shards) != len(self.lengths) or sum(self.lengths) != chosen.integer("num_samples"):
            raise ValueError(f"{chosen.where}: filenames, shard_lengths and num_samples do not fit together")
        missing = [shard for shard in self.shards if "://" not in shard and not Path(shard).is_file()]
        if missing:
            raise ValueError(f"{missing[0]}: no such shard ({len(missing)} of {len(self.shards)} are missing)")

    def read(self, shard: int, start: int) -> Iterator[Sample]:
        """Yield the samples of a shard, without the first `start`; ValueError if it is damaged or cannot be read."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        def wanted(member: str) -> bool:  # other members are skipped; nothing is decoded here, as webdataset would unpickle
            suffix, parts = Path(member).suffix.lower(), Path(member).parts
            known = suffix in (".cls", ".json") or suffix not in OTHER_SUFFIXES
            return known and not any(is_leftover(part) for part in parts if part not in (".", ".."))

        name, done = self.shards[shard], 0
        try:
            with _opened(name) as file:
                members = tar_file_expander([{"url": name, "stream": file}], select_files=wanted)
                for done, fields in enumerate(group_by_keys(members), 1):
                    if done > start:
                        yield self._sample(Path(name).name, fields)
        except Exception as error:  # of tarfile, of decompressors, of network libraries
            raise ValueError(f"{name}: cannot be read after {done} samples: {_first_line(error)}") from error

    def _sample(self, shard: str, fields: dict[str, Any]) -> Sample:
        key = fields["__key__"]
        endings = {f".{name.rpartition('.')[2].lower()}": value for name, value in fields.items() if not name.startswith("__")}
        try:
            notes = dict(json.loads(endings.pop(".json", b"{}")))
        except (RecursionError, TypeError, ValueError):
            notes = {}
        label = endings.pop(".cls", None)
        ordered = sorted(endings, key=lambda ending: ending not in IMAGE_SUFFIXES)
        content = next((endings[ending] for ending in ordered if is_image(endings[ending], ending)), None)
        return content, notes.get(self.label) if self.label else label, f"{shard}: {notes.get('filename', key)}"


def _read_info(name: str, root: str) -> tuple[str, Fields]:
    """Find the `_info.json` of shards; return where it lies, and what it holds."""
    places = [name] if "://" in name else [f"{root}/{name}", name, root] if name else [root]
    for place in places:
        try:
            with _opened(f"{place}/_info.json") as file:
                content = json.load(file)
        except FileNotFoundError:
            continue
        except Exception as error:  # of JSON, of network libraries
            raise ValueError(f"{place}/_info.json: cannot be read: {_first_line(error)}") from error
        return place, Fields(content, f"{place}/_info.json")
    raise ValueError(f"wds/{name}: no _info.json, which gmf shards writes, in {' or '.join(places)}")


class HuggingFace:
    """A split of a data set with one column of images and one of class labels.

    Args:
        name: A data set of the Hub, or a local folder in one of their formats.
        split: train or validation.

    Raises:
        ValueError: If there is no such data set or split, or if it has no such columns.
    """

    def __init__(self, name: str, split: str) -> None:
        import datasets

        place = f"hfids/{name}"
        try:
            builder = datasets.load_dataset_builder(name)
            splits = builder.as_streaming_dataset()
        except Exception as error:  # of the Hub, of the network, of the formats
            raise ValueError(f"{place}: cannot be opened: {_first_line(error)}") from error
        chosen = _choose(splits, split, place)
        features = splits[chosen].features or {}
        images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if not images or not labels:
            raise ValueError(f"{place}: expected a column of images and one of class labels, got {', '.join(features)}")
        self.image, self.label = images[0], labels[0]
        self.class_names = list(features[self.label].names)
        data = splits[chosen].select_columns([self.image, self.label])
        self.data = data.cast_column(self.image, datasets.Image(decode=False)).with_format("arrow")
        files = list((builder.config.data_files or {}).get(chosen, []))
        if len(files) == data.num_shards and all(file.endswith(".parquet") for file in files):
            self.shards, self.lengths = files, _parquet_lengths(files)
        else:  # read through once
            self.shards = [f"{place}: part {part}" for part in range(min(MAX_PARTS, data.num_shards))]
            self.lengths = [sum(len(table) for table in self._tables(part)) for part in range(len(self.shards))]

    def _tables(self, shard: int) -> Iterator[Any]:
        # In tables, because iteration by rows would split once more over the loader's workers.
        try:
            yield from self.data.shard(num_shards=len(self.shards), index=shard).iter(32)
        except Exception as error:  # of the network, of the formats
            raise ValueError(f"{self.shards[shard]}: cannot be read: {_first_line(error)}") from error

    def read(self, shard: int, start: int) -> Iterator[Sample]:
        """Yield the samples of a shard, without the first `start`; ValueError if it is damaged or cannot be read."""
        name, row = Path(self.shards[shard]).name, 0
        for table in self._tables(shard):
            rows = table.slice(max(0, start - row))
            row += len(table) - len(rows)
            for image, label in zip(rows[self.image].to_pylist(), rows[self.label].to_pylist(), strict=True):
                image = image or {"bytes": None, "path": None}
                yield _content(**image), label, f"{name}: {image['path'] or f'row {row}'}"
                row += 1


def _content(bytes: bytes | None, path: str | None) -> bytes | Path | None:
    if bytes is not None or path is None:
        return bytes
    if "://" not in path:
        return Path(path)
    try:
        with _opened(path) as file:
            return file.read()
    except Exception as error:  # of the network
        raise ValueError(f"{path}: cannot be read: {_first_line(error)}") from error


def _parquet_lengths(files: Sequence[str]) -> list[int]:
    """Numbers of rows, for which only the end of each file is read."""
    import fsspec
    from pyarrow import parquet

    def length(file: str) -> int:
        try:
            with fsspec.open(file, "rb") as opened:
                return int(parquet.read_metadata(opened).num_rows)
        except Exception as error:
            raise ValueError(f"{file}: cannot be read: {_first_line(error)}") from error

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(length, files))
