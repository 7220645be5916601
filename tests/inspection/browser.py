"""Drives Debian's Chromium over chromedriver's HTTP interface, with the standard library alone."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "Chromium and chromedriver are not installed (make browser)"
# Where they are installed on purpose, a test without them fails.
SKIPPED = bool(MISSING) and not os.environ.get("CI")
needs_browser = pytest.mark.skipif(SKIPPED, reason=MISSING)
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1200,900",
)  # fmt: skip
START_S = 60.0


class Browser:
    """One window of a browser with an empty profile."""

    def __init__(self, profile: Path) -> None:
        assert not MISSING, MISSING
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [str(DRIVER), f"--port={self._port}"]
        self._driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait()
            options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            self._session = ""
            opened = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._session = f"/session/{opened['sessionId']}"
        except BaseException:
            self._driver.kill()
            raise

    def open(self, file: Path) -> None:
        self.visit(file.absolute().as_uri())

    def visit(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def point(self, x: float, y: float) -> None:
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def screenshot(self) -> np.ndarray:
        data = base64.b64decode(self._call("GET", "/screenshot"))
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def log(self) -> list[dict[str, Any]]:
        return self._call("POST", "/se/log", {"type": "browser"})

    def media(self, kind: str = "", **features: str) -> None:
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self._command("Emulation.setEmulatedMedia", media=kind, features=listed)

    def phone(self, width: int, height: int) -> None:
        """Show pages as on a screen of that size, until :meth:`window`."""
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True
        )

    def window(self) -> None:
        self._command("Emulation.clearDeviceMetricsOverride")

    def pdf(self) -> bytes:
        return base64.b64decode(self._command("Page.printToPDF")["data"])

    def _command(self, name: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        self._session = ""
        while True:
            try:
                self._call("GET", "/status")
                return
            except OSError:
                if time.monotonic() > end or self._driver.poll() is not None:
                    raise
                time.sleep(0.1)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{self._session}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from error
