#!/usr/bin/env python3
"""what is in this image?"""

from effnet_quant.cli.classify import main

if __name__ == "__main__":
    main()
