"""A tiny vision-language model, and generated images with questions whose correct answers are known.

`scenes` draws images of coloured shapes and asks questions about them. `MODEL` is an InternVL checkpoint (Hugging Face
format, 6 MB) that was trained on them by `training/shapes.py`. With it, tests and the demo notice a swapped image, a
mixed-up row or a lost turn, without a download.
"""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
"""The directory of the checkpoint."""
