"""Placement of quantizers: at the marks of a model's definition, or on a traced graph."""
