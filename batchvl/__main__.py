"""Run the command line: `python -m batchvl`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="batchvl")
