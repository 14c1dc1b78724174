"""Draws the pictures of this folder and writes its manifests: `python manifests/make.py`. A test keeps them equal."""

from pathlib import Path

from batchvl.demo import draw

if __name__ == "__main__":
    draw(Path(__file__).parent)
