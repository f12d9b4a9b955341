"""What a network is: definitions, names, weights."""
