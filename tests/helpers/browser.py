"""A browser for tests of pages, if one is installed."""

import base64
import io
import json
import os
import shutil
import subprocess

from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--remote-debugging-pipe")  # fmt: skip


class Browser:
    """Headless Chromium, controlled over a pair of pipes."""

    def __init__(self, folder):
        (theirs, self.out), (self.into, back) = os.pipe(), os.pipe()

        def connect():  # where the browser expects them; over numbers that are neither
            os.dup2(theirs, 13), os.dup2(back, 14), os.dup2(13, 3), os.dup2(14, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=connect, pass_fds=(3, 4), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs), os.close(back)
        self.count, self.rest, self.messages, self.session = 0, b"", [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Log.enable"), self.send("Runtime.enable")

    def send(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        os.write(self.out, json.dumps({**message, **({"sessionId": self.session} if self.session else {})}).encode())
        os.write(self.out, b"\0")
        while True:
            while b"\0" not in self.rest:
                received = os.read(self.into, 2**16)
                assert received, "the browser is gone"
                self.rest += received
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.messages.append(answer)

    def evaluate(self, code):
        return self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)["result"]["value"]

    def open(self, path, width, height):
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Page.navigate", url=path.as_uri())
        while not self.evaluate("document.readyState == 'complete' && !!document.images.length"):
            pass
        self.evaluate("Promise.all([...document.images].map(image => image.decode())).then(() => 0)")

    def screenshot(self):
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data)))

    def close(self):
        self.send("Browser.close")
        self.process.wait(10)
        os.close(self.out), os.close(self.into)

    def errors(self):
        return [m for m in self.messages if m.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
