"""What multiproc.py starts where tests share processes: the command lines of a JSON file, one after another."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from effnet_quant.jobs import run
from effnet_quant.training.distributed import joined_world


def main():
    with joined_world() as world:
        run.joined_world = lambda: nullcontext(world)  # torch joins processes once
        for script, *arguments in json.loads(Path(sys.argv[1]).read_text()):
            status = importlib.import_module(f"effnet_quant.cli.{script.removesuffix('.py')}").job(arguments)
            if status != 0:
                sys.exit(status)


if __name__ == "__main__":
    main()
