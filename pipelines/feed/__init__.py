"""From a plan to the inputs of DALI: images, texts, substitutes for bad samples."""
