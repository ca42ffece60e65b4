"""Frames of video files, webcams and streams, and videos written; by PyAV, whose package brings FFmpeg along."""

import re
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import atomic_write, one_line

VIDEO_SUFFIXES = {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"}
# What FFmpeg calls webcams, and the name of the one with a number.
WEBCAMS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}


def is_stream(name: str) -> bool:
    """Whether a name is webcam, webcam:1 or an address, such as rtsp://host/stream."""
    return re.fullmatch(r"webcam(:.+)?|(rtsp|rtmp|https?|udp|tcp)://.+", name) is not None


def is_video(name: str) -> bool:
    """Whether a name is of a video file or a stream."""
    return is_stream(name) or Path(name).suffix.lower() in VIDEO_SUFFIXES


class Video:
    """A video that is read frame by frame.

    Args:
        source: A file, or what `is_stream` knows.
        every: Give each frame of this number.
        most: Give so many at most; all by default.

    Attributes:
        rate: Frames a second that are given.

    Raises:
        ValueError: If it cannot be opened, or has no images; also while it is read.
        ModuleNotFoundError: If PyAV is missing.
    """

    def __init__(self, source: str, every: int = 1, most: int | None = None) -> None:
        import av

        self.source, self.every, self.most, self._error = source, every, most, av.FFmpegError
        format, name = None, source
        if source.startswith("webcam"):
            format, place = WEBCAMS.get(sys.platform, WEBCAMS["linux"])
            name = place.format(source.partition(":")[2] or "0")
        elif not is_stream(source) and not Path(source).is_file():
            raise ValueError(f"{source}: no such file")
        try:
            self._container: Any = av.open(name, format=format)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        if not self._container.streams.video:
            raise ValueError(f"{source}: not a readable video: it has no images")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or 25) / every

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.source}: not a readable video: {one_line(getattr(error, 'strerror', None) or error)}")

    def __iter__(self) -> Iterator[tuple[int, float, Image.Image]]:
        """Yield the number of each frame, from 0 on, its time in seconds, and the image (RGB), upright."""
        with self._container:
            given = 0
            try:
                for number, frame in enumerate(self._container.decode(self._stream)):
                    if number % self.every:
                        continue
                    image = frame.to_image()
                    yield number, float(frame.time or 0), image.rotate(frame.rotation, expand=True) if frame.rotation else image
                    given += 1
                    if given == self.most:
                        return
            except self._error as error:
                raise self._unreadable(error) from error


def write_video(path: Path, frames: Iterable[Image.Image], rate: Fraction) -> bool:
    """Write frames as an MP4 file, atomically; return whether there was one. Sides are made even, as its coding asks."""
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return False
    import av

    to_frame: Any = av.VideoFrame.from_image
    with atomic_write(path) as folder, av.open(str(folder / path.name), "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream: Any = container.add_stream(codec, rate=rate.limit_denominator(60000))
        stream.width, stream.height = (side - side % 2 for side in first.size)
        stream.pix_fmt = "yuv420p"
        for image in chain([first], frames):
            cut = image.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(to_frame(cut)))
        container.mux(stream.encode())
    return True
