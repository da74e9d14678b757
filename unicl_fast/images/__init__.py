"""One encoded image: checking, decoding and encoding it."""
