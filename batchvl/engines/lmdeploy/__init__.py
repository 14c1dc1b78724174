"""LMDeploy 0.18 with its two engines, TurboMind and PyTorch, on NVIDIA GPUs.

engine.py         the `Engine`; imports neither torch nor LMDeploy before it resolves the model
model.py          from a model's name to a running pipeline
model_config.py   the model's configuration, and how its images must be prepared
engine_config.py  which of LMDeploy's engines runs, and its configuration
libraries.py      why TurboMind's native module does not load
chat.py           messages in LMDeploy's form, and the chat template
preparation.py    in image workers: a row to LMDeploy's inputs
processor.py      LMDeploy's own preparation, as image workers run it
inputs.py         LMDeploy's inputs as arrays for the arena, and back
conversation.py   one row: its turns, its answer, its failure
precomputed.py    where prepared rows enter LMDeploy's engine
prefix.py         what rows about the same images have in common, computed once
sampling.py       sampling settings and stop texts
handles.py        answers in one piece, and how busy LMDeploy is
"""

from .engine import LmdeployEngine

__all__ = ["LmdeployEngine"]
