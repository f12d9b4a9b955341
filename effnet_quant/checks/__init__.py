"""Checks of engines: agreement with the simulation (verify, layer_comparison), lint, latency, tuning."""

AGREEMENT = 99.5  # percent of the images on which an engine and its simulation must agree
