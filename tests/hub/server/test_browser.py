"""The pages in a browser: one path through them, rules of accessibility, a phone's width, and without JavaScript.

Needs Debian's `chromium` and `chromium-driver`. Nothing here reaches beyond this machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import surgery
from tests.hub.registry_tools import adapter
from tests.hub.server.serving import Server
from tests.tools import square_checkpoint

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="there is no chromium, or no chromedriver"),
]
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
CARD = """# Letters

Text with [a link](adapter_config.json) and `code`.

| split | loss |
|:--|--:|
| train | 1.2 |

```python
model = "a line that is longer than a phone is wide, and has to scroll on its own" + "and on and on and on"
```
"""


@pytest.fixture(scope="module", autouse=True)
def filled(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("folders")
    square_checkpoint(folder / "base", 12, 16)
    adapter(folder / "style", layers=12)
    (folder / "style" / "README.md").write_text(CARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_REGISTRY", str(server.data))
        patch.delenv("HF_ENDPOINT", raising=False)
        surgery.push(folder / "base", "lab/base")
        surgery.push(folder / "style", "lab/style")
    server.api("ada").create_repo("ada/secret", private=True)


def started(folder: Path, scripts: bool = True) -> Chrome:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    # A container has no name spaces of its own to give, and little shared memory.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={folder}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if not scripts:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    return Chrome(options, Service(DRIVER))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    driver = started(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def look(driver: Chrome, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def shows(driver: Chrome, text: str, expected: bool = True) -> None:
    """Wait until the page says, or no longer says, something: a click returns before the next page is there."""
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.support.wait import WebDriverWait

    def is_there(driver: Chrome) -> bool:
        return (text in driver.find_element("css selector", "main").text) == expected

    waiting = WebDriverWait(driver, 20, 0.1, [NoSuchElementException, StaleElementReferenceException])
    waiting.until(is_there, f"{driver.current_url} does not say {text!r}")


def follow(driver: Chrome, name: str) -> None:
    driver.find_element("link text", name).click()


def complaints(driver: Chrome) -> list[str]:
    """What the browser has to say: scripts and styles that were refused, files that were not found."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]


def test_one_path(server: Server, chromium: Chrome) -> None:
    """From the list to a tensor, in with a token, to what is private, and out; the first steps by keyboard alone."""
    from selenium.webdriver.common.keys import Keys

    driver = chromium
    look(driver, 1280)
    complaints(driver)
    driver.get(server.url)
    driver.switch_to.active_element.send_keys(Keys.TAB)
    skip = driver.switch_to.active_element
    assert skip.text == "Skip to content"
    assert skip.rect["x"] >= 0
    assert driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", skip) == "solid"
    skip.send_keys(Keys.ENTER)
    assert driver.switch_to.active_element.get_attribute("id") == "main"
    driver.switch_to.active_element.send_keys(Keys.TAB)
    field = driver.switch_to.active_element
    assert field.accessible_name == "Search"
    field.send_keys("style", Keys.ENTER)
    shows(driver, "1 model")
    follow(driver, "lab/style")
    shows(driver, "Text with a link and code.")
    assert driver.title == "lab/style · Adapter hub"
    assert driver.find_element("css selector", "button.copy").is_displayed()
    follow(driver, "Files")
    shows(driver, "Last commit")
    follow(driver, "adapter_model.safetensors")
    shows(driver, "24 tensors")
    follow(driver, "Lineage")
    shows(driver, "Made from it")
    follow(driver, "lab/base")
    shows(driver, "squares")
    follow(driver, "Log in")
    shows(driver, "Access token")
    driver.find_element("id", "token").send_keys(server.tokens["ada"], Keys.ENTER)
    shows(driver, "3 models")
    follow(driver, "ada")
    shows(driver, "Private")
    follow(driver, "ada/secret")
    shows(driver, "HF_TOKEN")
    follow(driver, "Tokens")
    shows(driver, "Make a token")
    driver.find_element("id", "label").send_keys("from the browser")
    driver.find_element("xpath", "//button[text()='Make the token']").click()
    shows(driver, "it is not shown again")
    driver.find_element("css selector", "button[aria-label='Revoke from the browser']").click()
    shows(driver, "from the browser", expected=False)
    driver.find_element("xpath", "//button[text()='Log out']").click()
    shows(driver, "Search")
    assert not complaints(driver)
    driver.get(f"{server.url}/ada/secret")
    shows(driver, "There is nothing here, or it is private")


PAGES = [
    "/", "/?rank=x", "/ada", "/datasets", "/login", "/settings/tokens", "/nothing/at-all", "/lab/style",
    "/lab/style/tree/main", "/lab/style/commits/main", "/lab/style/blob/main/adapter_model.safetensors",
    "/lab/style/blob/main/adapter_config.json", "/lab/base/lineage",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(server: Server, chromium: Chrome, scheme: str) -> None:
    """Contrast, names, landmarks, headings, tables and the rest of axe-core's rules; no page is wider than a phone."""
    from axe_core_python.selenium import Axe
    from selenium.webdriver.common.keys import Keys

    axe = Axe()
    chromium.get(f"{server.url}/login")
    if chromium.find_elements("id", "token"):
        chromium.find_element("id", "token").send_keys(server.tokens["ada"], Keys.ENTER)
        shows(chromium, "Search")
    commit = f"/lab/style/commit/{server.api().model_info('lab/style').sha}"
    for path in [*PAGES, commit]:
        look(chromium, 390 if scheme == "dark" else 1280, scheme)
        chromium.get(server.url + path)
        found = axe.run(chromium, options={"runOnly": {"type": "tag", "values": RULES}})
        seen = [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]]
        assert not seen, (path, seen)
        assert {"color-contrast", "html-has-lang", "landmark-one-main"} <= {rule["id"] for rule in found["passes"]}
        look(chromium, 390, scheme)
        wide = chromium.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, path


def test_without_scripts(server: Server, tmp_path: Path) -> None:
    """Everything is there but the buttons that copy."""
    driver = started(tmp_path, scripts=False)
    try:
        driver.get(f"{server.url}/lab/style")
        shows(driver, "How to load it")
        assert not driver.find_element("css selector", "button.copy").is_displayed()
        driver.get(f"{server.url}/?kind=adapter")
        shows(driver, "1 model")
    finally:
        driver.quit()
