"""For all tests: a slow machine is no failure, so hypothesis sets no time limit on an example."""

from hypothesis import settings

settings.register_profile("fedgraft", deadline=None)
settings.load_profile("fedgraft")
