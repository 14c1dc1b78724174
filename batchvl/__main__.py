"""`python -m batchvl` is the command `batchvl`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="batchvl")
