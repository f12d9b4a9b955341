"""``python -m effnet_quant VERB``: the same as ``effnet-quant VERB``."""

from effnet_quant.cli.app import main

if __name__ == "__main__":
    main()
