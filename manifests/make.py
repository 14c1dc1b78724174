"""Generate the images and manifests of this directory: `python manifests/make.py`. A test checks the committed ones."""

from pathlib import Path

from batchvl.demo import draw

if __name__ == "__main__":
    draw(Path(__file__).parent)
