"""Runs that are served and trained on: when their files change, the new model takes the place of the old one."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping

from ..files import one_line
from ..run_folder import CONFIG, RunFolder
from .serve import Model, Service

INTERVAL = 2.0  # seconds between two looks at the files
LOGGER = logging.getLogger(__name__)


def checksum(folder: RunFolder) -> str:
    """Return the first 16 digits of the SHA-256 of a run's weights."""
    with folder.weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Source:
    """Where a model comes from.

    Args:
        folder: Whose weights and config.json are watched.
        make: Loads a model from there.
    """

    def __init__(self, folder: RunFolder, make: Callable[[], Model]) -> None:
        self._folder, self._make = folder, make
        self._before = self._loaded = self._state()

    def _state(self) -> object:
        config = self._folder.path / CONFIG
        try:
            files = [self._folder.weights, *([config] if config.is_file() else [])]
            return [(file, (at := file.stat()).st_mtime_ns, at.st_size, at.st_ino) for file in files]
        except OSError:  # being replaced
            return None

    def load(self) -> Model:
        """Load it, and try it."""
        self._loaded = self._state()  # before, so that what changes meanwhile is loaded again
        model = self._make()
        model.warm_up()
        return model

    def changed(self) -> bool:
        """Tell whether its files are others than those last loaded, and the same as at the last look: all is written."""
        now, before = self._state(), self._before
        self._before = now
        return now is not None and now == before != self._loaded


class Reloader:
    """Puts the models of runs that changed in the place of those that a service has; if that fails, those stay.

    Args:
        serving: The service.
        sources: Of its models, by name.
        look: Whether to look at their files; if not, they are loaded again when that is asked for.
    """

    def __init__(self, serving: Service, sources: Mapping[str, Source], look: bool = True) -> None:
        self._serving, self._sources, self._look = serving, sources, look
        self._asked = False

    def ask(self) -> None:
        """Have all loaded again, changed or not."""
        self._asked = True

    async def watch(self) -> None:
        """Look at the files now and then, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            asked, self._asked = self._asked, False
            for name, source in self._sources.items():
                if asked or (self._look and await asyncio.to_thread(source.changed)):
                    await self._load(name, source)

    async def _load(self, name: str, source: Source) -> None:
        old = self._serving.models[name]
        try:
            new = await asyncio.to_thread(source.load)
            if new.task != old.task:
                raise ValueError(f"holds a model for {new.task}, expected one for {old.task}")
        except Exception as error:  # whatever is wrong with it, the old one answers
            reason = f"{type(error).__name__}: {one_line(error)}"
            LOGGER.error("%s: not loaded again, weights %s stay: %s", name, old.weights, reason)
        else:
            self._serving.models[name] = new
            LOGGER.warning("%s: loaded again, weights %s instead of %s", name, new.weights, old.weights)
