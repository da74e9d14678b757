"""The plan of a step, a pure function of (data, seed, step): samples, texts, crops, augmentation."""
