"""Hugging Face models on a CPU or a GPU, through the transformers library.

Serves image-text-to-text models whose processor's output is of a known family (`families.py`): InternVL (the `-hf`
checkpoints), Qwen2-VL and Qwen2.5-VL, SmolVLM and Idefics3; another model is refused with what its processor gave.

    engine.py        the engine's contract; imports neither torch nor transformers
    loading.py       a model's name to a model that answers
    configuration.py whether a model can be served
    device.py        where to compute, and in which type
    processor.py     the model's processor for text and pictures, without torchvision
    preparation.py   one request to tokens and pixels, in an image worker
    families.py      how rows' pictures are put into one batch
    generation.py    a list of rows to answers
    conversation.py  one row of it: turns, tokens, where an answer ends
    sampling.py      each row's own way of drawing tokens
"""

from .engine import TransformersEngine

__all__ = ["TransformersEngine"]
