"""Hugging Face models on a CPU or a GPU, through the transformers library.

Serves image-text-to-text models whose processor's output belongs to a known family (`families.py`): InternVL (the
`-hf` checkpoints), Qwen2-VL and Qwen2.5-VL, SmolVLM and Idefics3. Other models are refused with a message that lists
the arrays their processor returned.

    engine.py        the `Engine`; imports neither torch nor transformers
    loading.py       from a model's name to a loaded model
    device.py        device and data type
    processor.py     the model's processor for text and images, without torchvision
    preparation.py   one request to tokens and pixels, in an image worker
    families.py      how the image arrays of several rows form one batch
    generation.py    generation of answers, one batch after another
    conversation.py  the generation state of one row
    sampling.py      sampling with settings and a seed per row
"""

from .engine import TransformersEngine

__all__ = ["TransformersEngine"]
