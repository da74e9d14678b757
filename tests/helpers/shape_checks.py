"""The type checker that tests put around functions whose annotations give shapes."""

from beartype import BeartypeConf, beartype

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
