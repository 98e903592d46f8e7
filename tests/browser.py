"""A headless Chromium, driven through its DevTools protocol: one page, what it says on its console, what it fetches."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = "needs a browser: apt-get install chromium"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip

# Every element that shows text of its own, with the contrast of that text (WCAG 2.2) against what lies behind it.
CONTRASTS = """(() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = c => { const f = c.slice(0, 3).map(v => { v /= 255; return v <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const svg = e.namespaceURI.endsWith('svg');
    if (!own || ['STYLE', 'title', 'desc'].includes(e.tagName)) continue;
    const style = getComputedStyle(e), front = parse(svg ? style.fill : style.color), back = behind(e);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName, e.textContent.trim().slice(0, 40)]);
  }
  return found;
})()"""


class Browser:
    """A browser with one page; use it as a context.

    Attributes:
        said: errors and warnings of the page since it was opened.
        fetched: addresses that the page asked for, its own file left out.
    """

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self.profile = Path(tempfile.mkdtemp())
        flags = [*FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen([CHROMIUM, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop = asyncio.new_event_loop()
        self.number, self.said, self.fetched = 0, [], []
        self.loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self.loop.run_until_complete(self.session.close())
        self.loop.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    async def _connect(self) -> None:
        port_file, deadline = self.profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.is_file() and "\n" in port_file.read_text()):
            assert self.process.poll() is None and time.monotonic() < deadline, "the browser did not start"
            await asyncio.sleep(0.05)
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port_file.read_text().split()[0]}/json") as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **parameters):
        """The result of a command of the protocol; events that come meanwhile are noted."""
        self.number += 1
        return self.loop.run_until_complete(self._call(self.number, method, parameters))

    async def _call(self, number, method, parameters):
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=60)).data)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message["method"], message.get("params", {}))

    def _note(self, event, told) -> None:
        if event == "Runtime.exceptionThrown" or event == "Log.entryAdded":
            self.said.append(told)
        if event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.said.append(told)
        if event == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("data:", "about:")):
            self.fetched.append(told["request"]["url"])
        self.loaded = getattr(self, "loaded", False) or event == "Page.loadEventFired"

    def open(self, file: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Show a file in a window of this width."""
        self.said, self.fetched, self.loaded = [], [], False
        self.look(width=width, dark=dark)
        self.call("Page.navigate", url=file.resolve().as_uri())
        deadline = time.monotonic() + 60
        while not self.loaded:
            assert time.monotonic() < deadline
            self.run("document.readyState")
        self.fetched.remove(file.resolve().as_uri())

    def look(self, *, width: int = 1200, dark: bool = False, media: str = "screen") -> None:
        """Another window, theme or medium for the page that is open."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def run(self, script: str):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def contrasts(self) -> list[tuple[float, str, str]]:
        """The contrast of every text with what lies behind it, its tag, and how it begins."""
        return [tuple(row) for row in self.run(CONTRASTS)]

    def press(self, key: str) -> None:
        """A key, pressed and let go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9}[key])

    def picture(self, file: Path, *, height: int | None = None) -> None:
        """A PNG of the whole page, or of its upper part."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
