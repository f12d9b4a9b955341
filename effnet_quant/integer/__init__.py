"""Integer-only inference: its written rules (docs/integer.md), a plain reference, and a fast executor."""
