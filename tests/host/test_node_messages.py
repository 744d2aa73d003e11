"""Messages of nodes, shown in the browser window that queued the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def test_a_report_is_shown_and_kept(shown: dict[str, str]) -> None:
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.formats.negation_set import from_images
    from safe_guidance.nodes.negation_set_inspection import PreviewNegationSetNode

    images = from_images(torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0)))
    with CurrentNodeContext("prompt", "5:2"):
        output = PreviewNegationSetNode.execute(images, 64)
    assert "3 images" in shown["5:2"]
    assert output.ui["text"] == (shown["5:2"],) and len(output.ui["images"]) == 1


def test_without_a_prompt_nothing_is_shown(shown: dict[str, str]) -> None:
    from safe_guidance.nodes.host.engine.node_messages import message_ui

    assert message_ui("words")["text"] == ("words",) and shown == {}


def test_an_error_is_shown_until_the_node_succeeds(shown: dict[str, str]) -> None:
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.nodes.host.engine.node_messages import with_error_messages
    from safe_guidance.nodes.negation_set_files import LoadNegationSetNode

    node = with_error_messages(with_error_messages(LoadNegationSetNode))
    with CurrentNodeContext("prompt", "4"):
        with pytest.raises(FileNotFoundError):
            node.EXECUTE_NORMALIZED(name="none")
        assert shown["4"].startswith("There is no negation set named 'none'. Put its file into")
        assert len(node.EXECUTE_NORMALIZED(name="demo_star (bundled)").args[0]) > 1
    assert shown["4"] == ""


def test_an_error_while_sampling_is_shown_at_the_node_that_attached_the_correction(
    host: Any, shown: dict[str, str]
) -> None:
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.nodes.host.engine.correction import Correction, RunContext
    from safe_guidance.nodes.host.engine.hooks import attach

    class Failing(Correction):
        name = "Failing"

        def begin(self, context: RunContext) -> Any:
            raise ValueError("The VAE does not fit. Connect another.")

    with CurrentNodeContext("prompt", "3"):
        model = attach(host.model, Failing())
    with CurrentNodeContext("prompt", "9"), pytest.raises(ValueError, match="does not fit"):
        host.sample(model, host.text("a yellow star"), steps=2)
    assert shown == {"3": "The VAE does not fit. Connect another."}


def queued(nodes: dict[str, tuple[str, dict[str, Any]]], workflow: str) -> dict[str, Any]:
    """Return what the editor sends when it queues a prompt."""
    prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    return {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": {"id": workflow}}}}


def test_a_node_that_takes_no_part_in_a_new_prompt_shows_nothing(shown: dict[str, str]) -> None:
    import server

    from safe_guidance.nodes.host.engine.node_messages import show_message, with_error_messages
    from safe_guidance.nodes.negation_set_files import LoadNegationSetNode

    handlers: list[Any] = []
    instance: Any = server.PromptServer.instance
    instance.add_on_prompt_handler = handlers.append
    with_error_messages(LoadNegationSetNode)
    (on_prompt,) = handlers
    guard = {"1": ("SafeGuidanceSLD", {}), "2": ("SafeGuidanceSLD", {"model": ["1", 0]})}
    whole = {**guard, "9": ("SaveImage", {"images": ["2", 0]})}
    assert on_prompt(queued(whole, "mine")) == queued(whole, "mine")
    show_message("SLD acted.", "1")
    show_message("SLD acted too.", "2")
    # Another workflow may have other nodes of the same numbers.
    on_prompt(queued({"9": ("SaveImage", {})}, "another"))
    assert shown["1"] == "SLD acted."
    # Node 1 is connected to nothing that runs; then node 2 is bypassed.
    on_prompt(queued({**whole, "2": ("SafeGuidanceSLD", {})}, "mine"))
    assert (shown["1"], shown["2"]) == ("", "SLD acted too.")
    on_prompt(queued({"9": ("SaveImage", {})}, "mine"))
    assert shown["2"] == ""
    for bad in (None, [], {"prompt": None}, {"prompt": {"1": 3}}, {"prompt": {}, "extra_data": []}):
        assert on_prompt(bad) == bad


def test_every_node_shows_what_its_own_corrections_did(host: Any, shown: dict[str, str]) -> None:
    """Two equal methods of two nodes, and two methods of one node."""
    from comfy_execution.utils import CurrentNodeContext

    from safe_guidance.guidance.core.composition import Change
    from safe_guidance.nodes.host.engine.correction import Correction, Step
    from safe_guidance.nodes.host.engine.hooks import attach

    class Pushes(Correction):
        name = "SLD"

        def __init__(self, note: str) -> None:
            self.note = note

        def is_active(self, level: Any) -> bool:
            return True

        def correct(self, step: Step, state: None) -> Change:
            return Change(0.1 * step.denoised, step.every_row)

        def remarks(self, state: None) -> list[str]:
            return [self.note]

    model = host.model
    for node, note in (("1", "First of SLD."), ("2", "Second of SLD 2."), ("2", "Third.")):
        with CurrentNodeContext("prompt", node):
            model = attach(model, Pushes(note))
    host.sample(model, host.text("a yellow star"), steps=1)
    first, second = shown["1"].split("\n"), shown["2"].split("\n")
    assert first[0].startswith("SLD acted at 1 of 1") and first[1:] == ["First of SLD."]
    assert [line.partition(" acted")[0] for line in second] == [
        "SLD 2",
        "Second of SLD 2.",
        "SLD 3",
        "Third.",
    ]
