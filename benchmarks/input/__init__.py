"""The input pipeline against other loaders, its augmentation, and data under URLs."""
