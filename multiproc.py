#!/usr/bin/env python3
"""run a script in several processes that train together."""

from effnet_quant.cli.multiproc import main

if __name__ == "__main__":
    main()
