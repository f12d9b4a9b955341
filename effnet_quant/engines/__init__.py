"""Engines: compiled models behind one interface, one module per runtime."""
