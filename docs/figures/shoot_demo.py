"""Shoot demo.webp, -dark and -phone, next to this file, from a page on a run: ``python docs/figures/shoot_demo.py RUN``.

Needs Chromium. The point is a little above the middle of the run's first example.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from chromium import open_tab  # noqa: E402

VIEWS = {"demo": (1280, 800, "light"), "demo-dark": (1280, 800, "dark"), "demo-phone": (360, 780, "light")}
run = sys.argv[1]
command = [sys.executable, "-m", "groupmixformer.cli.main", "demo", run, "--port", "0"]
with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
    assert process.stderr
    shot = Path(folder, "shot.png")
    address = re.search(r"http://\S+", process.stderr.readline())
    assert address
    with open_tab("about:blank", Path(folder)) as tab:
        for name, view in VIEWS.items():
            tab.size(*view)
            tab.call("Page.navigate", url=address[0])
            tab.until("document.querySelector('#samples img')?.naturalWidth > 0")
            tab.click("#samples img")
            tab.until("document.querySelector('#shown img')?.naturalWidth > 0 && /ms/.test(document.body.innerText)")
            tab.click("#shown img", down=0.42)
            tab.until("[...document.querySelectorAll('#maps img')].filter(i => i.naturalWidth > 0).length == 4")
            tab.run("scrollTo(0, 0), new Promise(done => setTimeout(done, 1000))")  # animations end
            tab.screenshot(shot)
            Image.open(shot).convert("RGB").save(HERE / f"{name}.webp", quality=80, method=6)
    process.terminate()
