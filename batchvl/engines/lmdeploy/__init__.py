"""LMDeploy, its two engines TurboMind and PyTorch, on NVIDIA GPUs. For LMDeploy 0.18.

engine.py        the engine's contract; imports neither torch nor LMDeploy until it is started
model.py         a model's name to a pipeline that answers
config.py        which of LMDeploy's engines, and its configuration
template.py      which chat template
libraries.py     why TurboMind's native module does not load
pictures.py      one request's pictures to RGB pixels, in an image worker
conversation.py  one row: its turns, its end
chat.py          messages in LMDeploy's form
sampling.py      settings and stop texts in LMDeploy's form
failures.py      LMDeploy's errors in ours
"""

from .engine import LmdeployEngine

__all__ = ["LmdeployEngine"]
