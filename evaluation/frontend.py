"""Driver of the host's web interface in a headless Chromium."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .server import PACK_NAME

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Playwright

BROWSER_VARIABLE = "SAFE_GUIDANCE_BROWSER"
BROWSER_NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
BROWSER_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
HOW_TO_GET_ONE = (
    "No Chromium or Chrome was found. Install one (Debian: apt-get install chromium; "
    "Ubuntu: snap install chromium), "
    f"or set {BROWSER_VARIABLE} to the program."
)
WIDTH, HEIGHT = 1900, 1000
"""Size of the window in pixels."""
START_SECONDS = 120.0
RUN_SECONDS = 300.0
READY = """() => window.app?.graph && window.app.extensionManager?.setting
    && document.querySelector('[data-testid=queue-button]')"""
LOAD_TEMPLATE = """async ([pack, name]) => {
    const response = await fetch(`/api/workflow_templates/${pack}/${encodeURIComponent(name)}.json`);
    if (!response.ok) throw new Error(`${name}: status ${response.status}`);
    await app.loadGraphData(await response.json(), true, true, name);
}"""
TO_PROMPT = "async () => (await app.graphToPrompt()).output"
WATCH_RUN = """() => {
    window.outcome = null;
    const finish = kind => event => { window.outcome ??= [kind, event.detail ?? {}] };
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, finish(kind), { once: true });
}"""
OUTCOME = """() => {
    const rejected = app.extensionManager.lastNodeErrors;
    return rejected && Object.keys(rejected).length ? ['rejected', rejected] : window.outcome;
}"""
RED_NODES = """() => app.graph._nodes
    .filter(node => node.has_errors
        || (!node.constructor.nodeData && !node.isVirtualNode && !node.isSubgraphNode?.()))
    .map(node => `${node.id} ${node.title}`)"""
NODE_SIZES = """() => Object.fromEntries(app.graph._nodes.map(node => {
    const least = node.computeSize();
    return [node.id, [0, 1].map(axis => Math.max(node.size[axis], least[axis]))];
}))"""
MORE_LINES = 48
"""Height of three more lines of a node message; the interface itself reserves two."""
LEAST_HEIGHTS = """more => Object.fromEntries(app.graph._nodes.map(node => {
    const hasText = node.widgets?.some(widget => widget.name === '$$node-text-preview');
    return [node.id, node.computeSize()[1] + (hasText ? more : 0)];
}))"""
SET_WIDGET = """([kind, name, value]) => {
    for (const node of app.graph._nodes.filter(node => node.type === kind))
        node.widgets.find(widget => widget.name === name).value = value;
}"""
LIMIT_STEPS = """most => {
    for (const node of app.graph._nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name === 'steps' && widget.value > most) widget.value = most;
}"""


class FrontendError(RuntimeError):
    """Error of the web interface, such as a workflow that did not run."""


def find_browser(environ: Mapping[str, str] = os.environ) -> str | None:
    """Find the program of a Chromium or Chrome.

    It is the one that SAFE_GUIDANCE_BROWSER names, else one in the usual places, else None.

    Raises:
        FrontendError: when the named program does not exist.
    """
    named = environ.get(BROWSER_VARIABLE)
    if named:
        if not (path := shutil.which(named)):
            raise FrontendError(
                f"{BROWSER_VARIABLE} is {named}, and there is no such program. "
                "Set it to a Chromium or Chrome."
            )
        return path
    found = (shutil.which(name) for name in (*BROWSER_NAMES, *BROWSER_PLACES))
    return next((path for path in found if path), None)


def _launch_options() -> list[str]:
    options = ["--disable-gpu", "--hide-scrollbars"]
    # Chromium refuses to sandbox itself for root, which is what containers run as.
    if sys.platform != "win32" and os.geteuid() == 0:
        options.append("--no-sandbox")
    return options


class Frontend:
    """One browser window on a server; a context manager.

    `problems` collects what the browser's console reports as an error, and errors that no script caught.
    """

    def __init__(self, url: str, browser: str) -> None:
        self.url = url
        self.problems: list[str] = []
        self._program = browser
        self._playwright: Playwright | None = None
        self._browser: Browser | None = None
        self._page: Page | None = None

    @property
    def page(self) -> Page:
        """Return the window. Raises FrontendError before it is open."""
        if self._page is None:
            raise FrontendError("The window is not open. Use this object as a context manager.")
        return self._page

    def __enter__(self) -> Frontend:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(
                executable_path=self._program, args=_launch_options()
            )
            self._page = self._browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, locale="en-US")
            self._page.on("console", self._on_console)
            self._page.on("pageerror", self._on_error)
            self.open("/")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        if self._browser is not None:
            self._browser.close()
        if self._playwright is not None:
            self._playwright.stop()
        self._browser = self._playwright = self._page = None

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(f"{message.text} ({message.location.get('url', '')})")

    def _on_error(self, error: Error) -> None:
        self.problems.append(str(error))

    def open(self, path: str) -> None:
        """Open an address of the server and wait until the interface can be used.

        A first visit's dialogs are closed.
        """
        self.page.goto(self.url + path, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=START_SECONDS * 1000)
        # The template browser opens for a first visitor some time after everything else.
        self.page.wait_for_timeout(1500)
        self.close_dialogs()

    def close_dialogs(self) -> None:
        """Clear the screen of dialogs by Escape."""
        end = time.monotonic() + 10
        while self.page.get_by_role("dialog").count() and time.monotonic() < end:
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(200)

    def load_template(self, name: str) -> None:
        """Load one of the pack's workflows the way the template browser does."""
        self.page.evaluate(LOAD_TEMPLATE, [PACK_NAME, name])
        self.page.wait_for_timeout(300)

    def set_language(self, code: str) -> None:
        """Choose the interface's language, such as "fr", and reload, because nodes are named once."""
        self.page.evaluate("code => app.extensionManager.setting.set('Comfy.Locale', code)", code)
        self.page.wait_for_timeout(500)
        self.open("/")

    def to_prompt(self) -> dict[str, Any]:
        """Return the open workflow as the interface would send it."""
        prompt: dict[str, Any] = self.page.evaluate(TO_PROMPT)
        return prompt

    def limit_steps(self, most: int) -> None:
        """Lower every node's steps to at most this many."""
        self.page.evaluate(LIMIT_STEPS, most)

    def set_widget(self, kind: str, name: str, value: Any) -> None:
        """Give a setting of every node of a type a value."""
        self.page.evaluate(SET_WIDGET, [kind, name, value])

    def run(self) -> None:
        """Run the open workflow by the Run button and wait for its end.

        Raises:
            FrontendError: when the server rejects the workflow or a node fails.
        """
        self.page.evaluate(WATCH_RUN)
        self.page.get_by_test_id("queue-button").click()
        outcome = self.page.wait_for_function(OUTCOME, timeout=RUN_SECONDS * 1000).json_value()
        if outcome[0] != "execution_success":
            raise FrontendError(f"The workflow ended with {outcome[0]}: {outcome[1]}")
        # Texts and images of the last node appear a moment later and make nodes taller.
        self.page.wait_for_timeout(500)

    def red_nodes(self) -> list[str]:
        """List the nodes that the interface marks as missing or failed."""
        found: list[str] = self.page.evaluate(RED_NODES)
        return found

    def node_sizes(self) -> dict[str, list[float]]:
        """Return every node's drawn width and height, without the title bar, by its id."""
        found: dict[str, list[float]] = self.page.evaluate(NODE_SIZES)
        return found

    def least_heights(self) -> dict[str, float]:
        """Return the least height of every node, without the title bar, by its id.

        Texts and images of a run can raise it.
        """
        found: dict[str, float] = self.page.evaluate(LEAST_HEIGHTS, MORE_LINES)
        return found

    def screenshot(self, path: Path) -> None:
        """Save an image of the window with the whole workflow in view."""
        self.page.mouse.click(WIDTH // 2, HEIGHT - 20)
        self.page.keyboard.press(".")
        self.page.wait_for_timeout(1200)
        self.page.screenshot(path=path)
