"""Values of Safe Denoiser's inputs that tests set by hand, where the nodes' defaults are automatic."""

from __future__ import annotations

WHOLE_IMAGES = {
    "strength": 0.33,
    "start_sigma": 1000.0,
    "end_sigma": 4.67,
    "threshold": 0.4,
    "temperature": 0.1,
    "cap": 0.5,
}
"""The paper's window and a gentle strength, for sets without masks."""
