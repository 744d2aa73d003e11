"""Use of a running ComfyUI server through its HTTP interface."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .server_errors import PromptFailed, PromptRejected

POLL_SECONDS = 0.05
REQUEST_SECONDS = 60.0


class ServerClient(ABC):
    """Client of the ComfyUI server at `url`."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Return the address of the server."""

    @abstractmethod
    def raise_if_ended(self) -> None:
        """Raise ServerError if the server has ended; called when it does not answer a request."""

    def get_bytes(self, path: str) -> bytes:
        """Get the body that the server sends for a path. Raises HTTPError (of urllib) for an error status."""
        with urllib.request.urlopen(self.url + path, timeout=REQUEST_SECONDS) as response:
            return bytes(response.read())

    def get_json(self, path: str) -> Any:
        """Get the JSON that the server sends for a path. Raises HTTPError (of urllib) for an error status."""
        return json.loads(self.get_bytes(path))

    def post_json(self, path: str, body: Any) -> Any:
        """Send JSON and return the JSON of the answer, or None if it is empty.

        Raises PromptRejected on status 400, else HTTPError.
        """
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(_error_body(error.read())) from error
        return json.loads(content) if content else None

    def run(self, prompt: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """Run a prompt in the API's form and return its entry of the history.

        Raises PromptRejected, PromptFailed, TimeoutError (the prompt is then interrupted) and ServerError
        when the server ends.
        """
        prompt_id = self.post_json("/prompt", {"prompt": prompt})["prompt_id"]
        end = time.monotonic() + timeout
        while True:
            entry: dict[str, Any] | None = self._history(prompt_id)
            if entry is not None:
                break
            if time.monotonic() > end:
                self.interrupt()
                raise TimeoutError(
                    f"The prompt did not end within {timeout:.0f} s and was interrupted. Allow it more time."
                )
            time.sleep(POLL_SECONDS)
        _check_success(entry)
        return entry

    def _history(self, prompt_id: str) -> dict[str, Any] | None:
        try:
            found: dict[str, dict[str, Any]] = self.get_json(f"/history/{prompt_id}")
        except OSError:
            self.raise_if_ended()
            raise
        return found.get(prompt_id)

    def images(self, entry: Mapping[str, Any]) -> list[bytes]:
        """Return the image files that a prompt wrote, by its entry of the history."""
        found = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        return [self.get_bytes("/view?" + urllib.parse.urlencode(image)) for image in found]

    def interrupt(self) -> None:
        """Interrupt the prompt that runs now."""
        self.post_json("/interrupt", {})


def _error_body(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {"error": content.decode("utf-8", "replace")}


def _check_success(entry: Mapping[str, Any]) -> None:
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return
    messages: dict[str, dict[str, Any]] = dict(status.get("messages", []))
    details = messages.get("execution_error")
    if details is not None:
        raise PromptFailed(
            str(details["node_type"]), str(details["exception_type"]), str(details["exception_message"])
        )
    interrupted = messages.get("execution_interrupted", {})
    raise PromptFailed(str(interrupted.get("node_type")), "Interrupted", "the prompt was interrupted")
