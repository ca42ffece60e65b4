"""Shoot demo.png, next to this file, from a page on a run with examples: ``python docs/figures/shoot_demo.py RUN``.

Needs Chromium. The point is a little above the middle of the run's first example.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from chromium import open_tab  # noqa: E402

run = sys.argv[1]
command = [sys.executable, "-m", "groupmixformer.cli.main", "demo", run, "--port", "0"]
with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
    assert process.stderr
    shot = Path(folder, "shot.png")
    address = re.search(r"http://\S+", process.stderr.readline())
    assert address
    with open_tab(address[0], Path(folder)) as tab:
        tab.until("document.querySelector('#file input[type=file]') !== null")
        tab.upload("#file input[type=file]", min(Path(run, "examples").glob("*.png")).resolve())
        tab.until("document.querySelector('#shown img')?.naturalWidth > 0 && /ms/.test(document.body.innerText)")
        tab.click("#shown img", down=0.42)
        tab.until("[...document.querySelectorAll('#maps img')].filter(i => i.naturalWidth > 0).length == 4")
        tab.run("new Promise(done => setTimeout(done, 1000))")  # animations end
        tab.screenshot(shot)
    process.terminate()
    with Image.open(shot) as image:
        page = image.convert("RGB")
    left, top, right, bottom = ImageChops.invert(page).getbbox() or (0, 0, *page.size)
    page = page.crop((left - 8, top - 8, right + 8, bottom + 8))
    page.point(lambda value: round(value / 5) * 5).save(HERE / "demo.png", optimize=True)  # steps nobody sees: half the size
