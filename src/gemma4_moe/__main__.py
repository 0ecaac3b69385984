"""`python -m gemma4_moe` is the command `gemma4-moe`."""

from gemma4_moe.cli.commands import main

main()
