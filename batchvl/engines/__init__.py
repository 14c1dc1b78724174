"""Engines, which run models. They know nothing of the runner.

    base.py        the `Engine` protocol, with what an engine is started with and what it reports
    registry.py    every engine by name, and how a run chooses one; the place to add an engine
    probe.py       whether an engine's libraries can be imported
    checkpoint.py  for engines that load models themselves: a model's files
    cuda.py        … the GPU
    scaling.py     … the sizes that image processors make
    fake.py        an engine without a model
    lmdeploy/      LMDeploy
    transformers/  Hugging Face transformers

`serving/` starts each engine in a process of its own and keeps it alive.
"""
