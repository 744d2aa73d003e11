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
