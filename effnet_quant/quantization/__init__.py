"""How a network becomes 8-bit."""
