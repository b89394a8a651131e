"""`python -m ticketops`, for where the command is not on the path."""

from ticketops.cli import main

main()
