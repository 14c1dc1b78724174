"""A small vision-language model whose answers can be checked, and the drawn pictures it knows.

`scenes` draws pictures of coloured shapes and asks questions about them, each with its true answer. `MODEL` is the
folder of an InternVL checkpoint (Hugging Face format, 6 MB, vision and language) that answers those questions, so a
test or a demonstration can tell a swapped picture, a mixed-up row or a lost turn from a right answer, without a
download. `training/shapes.py` made it.
"""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
