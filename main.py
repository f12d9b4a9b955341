#!/usr/bin/env python3
"""train or evaluate a float network."""

from effnet_quant.cli.main import main

if __name__ == "__main__":
    main()
