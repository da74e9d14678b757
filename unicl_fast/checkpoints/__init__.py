"""A run's state on disk: written while training continues, checked, loaded, exported."""
