"""One module per script: arguments in, calls to the other rooms, nothing else."""
