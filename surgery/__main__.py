"""`python -m surgery`: the command, for `accelerate launch -m surgery` and where no script is on the path."""

from surgery.cli.main import main

main()
