"""Is the engine true to its simulation, and is it fast: verify, layer by layer, lint, latency, tuning."""
