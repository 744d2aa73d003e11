"""Types of the pack's own connections."""

from __future__ import annotations

from comfy_api.latest import io

NegationSetType = io.Custom("NEGATION_SET")
SemanticConceptsType = io.Custom("SEMANTIC_CONCEPTS")
SafetyFunctionType = io.Custom("SAFETY_FUNCTION")
SafetyTraceType = io.Custom("SAFETY_TRACE")
GuidelineTokensType = io.Custom("GUIDELINE_TOKENS")
RecordedAttentionType = io.Custom("RECORDED_ATTENTION")
