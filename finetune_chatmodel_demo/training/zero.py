"""DeepSpeed ZeRO: what its stages share out among the processes, and what a run with it has to do differently.

    ZeRO-2   gradients and the optimizer's state are shared out, every process holds all weights
    ZeRO-3   the weights are shared out as well, while they are loaded already

Exercise it with `pytest -m slow tests/test_deepspeed.py`.
"""


def connect() -> None:
    """Lets DeepSpeed use the connection between the processes that torch has.

    On GPUs accelerate does it with the settings; on the CPU nobody does, and ZeRO-3 would take each process for the
    only one while it loads the weights.
    """
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()
