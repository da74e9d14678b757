"""How many examples a test of a property draws: the profiles of tests/conftest.py."""

from hypothesis import settings


def examples(many: int) -> settings:
    """Has a test draw `many` with the profile of this name; else a tenth of them, at least 5."""
    share = settings().max_examples / settings.get_profile("many").max_examples
    return settings(max_examples=min(many, max(5, round(many * share))))
