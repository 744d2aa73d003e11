"""Images, tables and JSON for people: traces, contact sheets, curves, overlays, descriptions of negation sets."""
