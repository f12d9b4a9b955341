"""Where quantizers go: in marked definitions, and on a traced graph."""
