"""Image and text encoders, `UniCL`, which holds both; their precision, compilation, freezing."""
