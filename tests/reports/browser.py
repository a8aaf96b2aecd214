"""A headless Chromium that opens a page and tells what it asked for and complained about."""

import json
import shutil

import pytest


class Browser:
    """One window of Debian's chromium, driven by its chromium-driver."""

    def __init__(self, *, dark: bool = False, width: int = 1200, height: int = 900):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        # The size of the page, where a window's has a border and a smallest width.
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def open(self, address: str) -> None:
        """Opens a page and waits until it is loaded."""
        self.driver.get(address)

    def run(self, script: str):
        """What a script returns."""
        return self.driver.execute_script(script)

    def complaints(self) -> list[str]:
        """What the page has logged so far."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked_for(self) -> list[str]:
        """Addresses that were asked for so far, those of data in the page itself left out."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        asked = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith("data:")]

    def close(self) -> None:
        """Ends the browser."""
        self.driver.quit()


def needs_browser() -> None:
    """Skips a test where there is no browser."""
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"no {program} here; on Debian: apt-get install chromium chromium-driver")
