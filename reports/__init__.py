"""Reports as images, tables and JSON: traces, contact sheets, curves, overlays, set statistics."""
