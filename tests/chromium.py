"""A page in headless Chromium, driven over its DevTools protocol; remembers what the page asked the network for."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1200,900",
]

# The point of an element at shares of its width and height, or null while a click there may miss it.
PLACE = """
async (selector, across, down) => {
    const find = () => {
        const element = document.querySelector(selector);
        if (element === null || element.complete === false) return null;
        const {x, y, width, height} = element.getBoundingClientRect();
        return {element, x: x + across * width, y: y + down * height};
    };
    const before = find();
    await new Promise(resolve => setTimeout(resolve, 100));
    const after = find();
    if (!before || !after || before.element !== after.element || before.x !== after.x || before.y !== after.y) return null;
    const top = document.elementFromPoint(after.x, after.y);
    return after.element.contains(top) ? {x: after.x, y: after.y} : null;
}
"""


class Tab:
    """A page.

    Attributes:
        requested: The addresses that it asked for.
        said: Errors in its console.
    """

    def __init__(self, socket):
        self._socket, self._number = socket, 0
        self.requested, self.said = [], []
        for domain in ("Network", "Page", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("method") in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                asked = message["params"]
                self.requested.append(asked["request"]["url"] if "request" in asked else asked["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.said.append(message["params"]["exceptionDetails"])
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def run(self, script):
        """Give the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script, seconds=240):
        """Wait for a JavaScript expression to become true, and give its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script}: not after {seconds} s; the page says: {self.text()}"
            time.sleep(0.1)
        return value

    def text(self):
        return self.run("document.body.innerText")

    def upload(self, selector, path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def click(self, selector, across=0.5, down=0.5):
        """Click at shares of the width and height of an element that has loaded, keeps its place and is not covered."""
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        place = self.until(f"({PLACE})({json.dumps(selector)}, {across}, {down})")
        mouse = {**place, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **mouse)

    def size(self, width, height, scheme="light"):
        """Let the window be a screen of so many pixels, of a user who prefers light or dark pages."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def open_tab(address, folder):
    """Start Chromium with a new profile in a folder, and open a page."""
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with (folder / "chromium.log").open("w") as log, subprocess.Popen(command, stderr=log, stdout=log) as process:
        try:
            port, deadline = folder / "profile" / "DevToolsActivePort", time.monotonic() + 240
            while not (port.exists() and port.read_text().count("\n")):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "chromium.log").read_text()
                time.sleep(0.1)
            number, path = port.read_text().splitlines()[:2]
            with connect(f"ws://127.0.0.1:{number}{path}", max_size=None, proxy=None) as browser:

                def ask(method, **parameters):
                    browser.send(json.dumps({"id": 1, "method": method, "params": parameters}))
                    return next(m for m in iter(lambda: json.loads(browser.recv(timeout=30)), None) if m.get("id") == 1)[
                        "result"
                    ]

                target = ask("Target.createTarget", url="about:blank")["targetId"]
                with connect(f"ws://127.0.0.1:{number}/devtools/page/{target}", max_size=None, proxy=None) as socket:
                    tab = Tab(socket)
                    tab.call("Page.navigate", url=address)
                    yield tab
                    ask("Browser.close")
            process.wait(20)
        finally:
            process.kill()
