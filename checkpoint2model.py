#!/usr/bin/env python3
"""the weights of a checkpoint, as a file of their own."""

from effnet_quant.cli.checkpoint2model import main

if __name__ == "__main__":
    main()
