"""A step as a pure function of (data, seed, step): samples, texts, crops, augmentation."""
