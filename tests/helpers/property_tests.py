"""How many examples a test of a property draws: few, or many with `--hypothesis-profile many`.

The profiles are made here, since processes that import a test alone see no conftest.py.
"""

from hypothesis import settings

# Timed out by us, not by hypothesis: first calls compile and the machine may be busy.
settings.register_profile("many", deadline=None, derandomize=True)
settings.register_profile("few", settings.get_profile("many"), max_examples=10)
settings.load_profile("few")


def examples(many: int) -> settings:
    """Has a test draw `many` with the profile of this name; else a tenth of them, at least 5."""
    share = settings().max_examples / settings.get_profile("many").max_examples
    return settings(max_examples=min(many, max(5, round(many * share))))
