"""Networks: their definitions, names and weights."""
