from hypothesis import settings

# The same cases in every run, and no deadline: first calls into torch take a second on a busy machine.
settings.register_profile("ticketops", deadline=None, derandomize=True)
settings.load_profile("ticketops")
