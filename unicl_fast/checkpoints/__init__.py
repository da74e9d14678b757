"""A run's state on disk: written beside training, checked, loaded, exported."""
