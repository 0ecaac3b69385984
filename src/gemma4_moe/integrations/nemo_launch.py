"""NeMo AutoModel's command line with our adapter: `python -m gemma4_moe.integrations.nemo_launch RECIPE.yaml ...`.

The arguments are those of `automodel`. NeMo's own command starts a recipe's file under torchrun, where nothing could
install the adapter first. So this command starts torchrun itself, with this module in each process; a process of
torchrun installs the adapter and lets NeMo run the recipe.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch.distributed import run as torchrun

from gemma4_moe.errors import UsageError
from gemma4_moe.integrations import nemo_automodel


def main(arguments: list[str] | None = None) -> int | None:
    """Run NeMo's command with `arguments`, by default those of this process, and return its status.

    Raises:
        UsageError: NeMo AutoModel is not as expected; or the recipe is for a launcher of other machines.
    """
    from nemo_automodel.cli import app, utils  # type: ignore[import-untyped]

    arguments = sys.argv[1:] if arguments is None else arguments
    options, _ = app.build_parser().parse_known_args(arguments)
    remote = {"skypilot", "nemo_run"} & set(utils.load_yaml(options.config) or {})
    if remote:
        raise UsageError(
            "a recipe that NeMo starts on other machines, without our adapter",
            file=options.config,
            expected="no section skypilot or nemo_run",
            found=", ".join(sorted(remote)),
            hint=f"let that launcher run: torchrun --nproc-per-node N -m {__spec__.name} RECIPE.yaml",
        )
    if not dist.is_torchelastic_launched():
        processes = "gpu" if options.nproc_per_node is None else str(options.nproc_per_node)
        launch = ["--standalone", "--nproc-per-node", processes, "-m", __spec__.name, *arguments]
        torchrun.run(torchrun.parse_args(launch))  # type: ignore[no-untyped-call]
        return 0
    nemo_automodel.install()
    sys.argv = ["automodel", *arguments]
    status: int | None = app.main()
    return status


if __name__ == "__main__":
    sys.exit(main())
