"""Model repositories of inference servers."""
