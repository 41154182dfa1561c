"""A headless Chromium, driven through a pipe with the Chrome DevTools Protocol."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time


PATIENCE = 30  # seconds for the browser to answer


def chromium():
    """The path of the browser; None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A page: `requests` are the addresses that it asked for, `problems` what it wrote as errors."""

    def __init__(self, commands, answers):
        self.commands, self.answers, self.received = commands, answers, b""
        self.last, self.session, self.loaded, self.requests, self.problems = 0, None, set(), [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def send(self, method, **parameters):
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        os.write(self.commands, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode())
        os.write(self.commands, b"\0")
        while (answer := self._read()).get("id") != self.last:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.received:
            assert select.select([self.answers], [], [], max(end - time.monotonic(), 0))[0], "Chromium does not answer"
            self.received += os.read(self.answers, 2**20)
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(event["params"]["exceptionDetails"])
        if event.get("method") == "Page.lifecycleEvent" and event["params"]["name"] == "load":
            self.loaded.add(event["params"]["loaderId"])

    def open(self, url):
        loader = self.send("Page.navigate", url=url)["loaderId"]
        while loader not in self.loaded:
            self._note(self._read())

    def evaluate(self, expression):
        """The value of an expression of JavaScript, awaited if it is a promise."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression, seconds=PATIENCE / 2):
        """The value of an expression once it is true. It may not be an element, which has no value here."""
        found = self.evaluate(
            f"""new Promise((done) => {{
              const start = Date.now();
              const look = () => {{
                let found = null;
                try {{ found = {expression}; }} catch (error) {{}}
                if (found || Date.now() - start > {1000 * seconds}) done(found); else setTimeout(look, 20);
              }};
              look();
            }})"""
        )
        assert found, f"waited {seconds} s for {expression}, the page says: {self.evaluate('document.body.innerText')}"
        return found

    def point(self, selector, index=0, click=False):
        """Move the pointer over the middle of an element, and click it."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        box = self.evaluate(f"{element}.getBoundingClientRect().toJSON()")
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **where)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def type(self, selector, text):
        """Replace the text of a field, and press Enter."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "text": "\r", "windowsVirtualKeyCode": 13}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def choose_file(self, selector, path):
        document = self.send("DOM.getDocument")["root"]["nodeId"]
        field = self.send("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=field, files=[str(path)])

    def screenshot(self, path):
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browse(profile, width=1400, height=900):
    """A page of a browser that keeps its files in a folder, and asks nobody but this machine."""
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    # The protocol is spoken on the files 3 and 4, so that the pipes must not be those themselves
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_browser, from_browser)]
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    arguments += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--no-first-run"]
    process = subprocess.Popen(
        [chromium(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: [os.dup2(end, place) for end, place in zip(high, (3, 4), strict=True)],
        pass_fds=(3, 4),
    )
    for end in (to_browser, from_browser, *high):
        os.close(end)
    try:
        yield Page(commands, answers)
    finally:
        process.terminate()
        process.wait()
        os.close(commands)
        os.close(answers)
