"""The errors a user can meet; each message names the value, the reason and the remedy in one line."""


class TicketopsError(Exception):
    """Base of every error that ticketops raises on purpose."""


class InputError(TicketopsError, ValueError):
    """A bad argument, file, task or ticket."""


class UnsupportedError(TicketopsError, ValueError):
    """A model, argument, dtype or option that ticketops does not serve."""


class StoreError(TicketopsError):
    """The output folder cannot be used: occupied, read-only, full, or made by another configuration."""
